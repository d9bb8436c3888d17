"""Artefacts of different bases are refused; the message names both and says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World, make_world, random_carryon
from safetensors.torch import load_file, save_file

from embedcache.base import home
from embedcache.base.load import load_base, load_identity
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import ATTRIBUTE, SCHEMA, ExtractSettings
from embedcache.compose.model import compose
from embedcache.corpus.config import CorpusConfig
from embedcache.editing.merge import merge
from embedcache.errors import CacheError, IdentityError
from embedcache.evaluation.evaluate import evaluate
from embedcache.evaluation.live import evaluate_cache_live
from embedcache.extraction.extract import extract
from embedcache.store.files import hash_file, publish_json
from embedcache.training.config import TrainConfig
from embedcache.training.train import preview, train


def another_weight(base: Path, name: str) -> None:
    path = base / "model.safetensors"
    weights = load_file(path)
    weights[name] = weights[name] + 1
    save_file(weights, path, {"format": "pt"})


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights": ("weights", lambda base: another_weight(base, "model.layers.0.mlp.up_proj.weight")),
    "head": ("weights", lambda base: another_weight(base, "lm_head.weight")),
    "tokenizer": (
        "tokenizer",
        lambda base: edit_json(
            base / "tokenizer.json", lambda value: value["added_tokens"][0].update(rstrip=True)
        ),
    ),
    "template": (
        "chat template",
        lambda base: (base / "chat_template.jinja").write_text("{{ messages }}") and None,
    ),
    "configuration": (
        "config",
        lambda base: edit_json(
            base / "config.json", lambda value: value.update(final_logit_softcapping=3.0)
        ),
    ),
}


def finished_extraction(world: World, base: Path, out: Path) -> None:
    """Run the extraction again that `make_world` ran for ``tapped``."""
    corpus = CorpusConfig(
        sources=(str(world.corpus),), context=64, dev_fraction=0.2, test_fraction=0.2
    )
    settings = ExtractSettings(
        context=64, block_tokens=256, batch_tokens=256, taps=("final", "layer_1")
    )
    extract(corpus, base=str(base), out=out, settings=settings, device="cpu")


def both_sides(message: str, *places: object) -> None:
    for place in places:
        assert str(place) in message, message


@pytest.mark.parametrize(
    ("change", "named"), [("weights", "the same"), *((change, "another") for change in CHANGES)]
)
def test_another_revision_of_the_base_is_refused_by_every_verb(
    tapped: World, tmp_path: Path, change: str, named: str
) -> None:
    part, act = CHANGES[change]
    folder = tmp_path / "base"
    cache = tapped.cache_path
    if named == "the same":  # the files under one path have changed
        cache = shutil.copytree(cache, tmp_path / "cache")
        folder = tapped.base_path
        kept = shutil.copytree(folder, tmp_path / "kept")
    else:
        shutil.copytree(tapped.base_path, folder)
    carryon = random_carryon(tapped, tmp_path / "carryon")
    mine = tapped.cache().attributes.base["fingerprint"][:12]
    try:
        act(folder)
        base = load_base(folder, device="cpu")
        verbs: dict[str, tuple[Callable[[], object], Path]] = {
            "compose": (lambda: compose(base, carryon), carryon),
            "evaluate live": (lambda: evaluate_cache_live(base, carryon, cache), cache),
            "extract": (lambda: finished_extraction(tapped, folder, cache), cache),
        }
        for verb, (call, place) in verbs.items():
            with pytest.raises(IdentityError, match=f"They differ in: {part}") as told:
                call()
            message = str(told.value)
            both_sides(message, place, mine, base.identity.fingerprint[:12])
            way_out = "org/name@revision" if named == "the same" else "`base=`"
            assert way_out in message, verb
    finally:
        if named == "the same":
            shutil.copytree(kept, folder, dirs_exist_ok=True)


def test_caches_and_carry_ons_of_two_bases_are_refused(
    world: World, tapped: World, tmp_path: Path
) -> None:
    carryon = random_carryon(world, tmp_path / "carryon")
    prints = [w.cache().attributes.base["fingerprint"][:12] for w in (world, tapped)]
    calls: dict[str, tuple[Callable[[], object], tuple[Path, ...]]] = {
        "evaluate": (
            lambda: evaluate(carryon, tapped.cache_path, device="cpu"),
            (carryon, tapped.cache_path),
        ),
        "merge": (
            lambda: merge([world.cache_path, tapped.cache_path], tmp_path / "both"),
            (world.cache_path, tapped.cache_path),
        ),
        "compose": (lambda: compose(tapped.base(), carryon), (carryon,)),
    }
    for call, places in calls.values():
        with pytest.raises(IdentityError, match="need the same base") as told:
            call()
        both_sides(str(told.value), *places, *prints)
    assert not (tmp_path / "both").exists()


READERS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda cache, out: train(cache, out=out, config=TrainConfig(), device="cpu"),
    "preview": lambda cache, out: preview(cache, out=out, config=TrainConfig(), device="cpu"),
    "evaluate": lambda cache, out: evaluate(out.parent / "carryon", cache, device="cpu"),
    "merge": lambda cache, out: merge([cache, cache], out),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_unfinished_cache_and_a_newer_schema_are_refused(
    world: World, tmp_path: Path, reader: str
) -> None:
    random_carryon(world, tmp_path / "carryon")
    cache, out = shutil.copytree(world.cache_path, tmp_path / "cache"), tmp_path / "out"
    edit_json(
        cache / "zarr.json", lambda value: value["attributes"][ATTRIBUTE].update(schema=SCHEMA + 1)
    )
    with pytest.raises(
        CacheError,
        match=rf"{cache} has cache schema {SCHEMA + 1}.*reads up to "
        rf"{SCHEMA}\. Upgrade with: pip install --upgrade",
    ):
        READERS[reader](cache, out)
    shutil.copy(world.cache_path / "zarr.json", cache / "zarr.json")
    (cache / "manifest.json").unlink()
    with pytest.raises(
        CacheError, match=r"not complete.*being written.*`embedcache\.extract\(\)` again"
    ):
        READERS[reader](cache, out)
    assert not out.exists()


def test_the_known_hash_of_a_large_base_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are a sparse file of 60 GB; path, size and time give its hash."""
    world = make_world(tmp_path, arch="gemma3_text", tied=False, taps=("final", "layer_1"))
    weights = world.base_path / "model.safetensors"
    sha256 = hash_file(weights)
    with weights.open("r+b") as file:
        file.truncate(60_000_000_000)
    status = weights.stat()
    monkeypatch.setenv("EMBEDCACHE_HOME", str(tmp_path / "home"))
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    publish_json(tmp_path / "home/hashes.json", {str(weights.resolve()): known})

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(home, "hash_file", read)
    finished_extraction(world, world.base_path, world.cache_path)
    carryon = tmp_path / "carryon"
    train(world.cache_path, out=carryon, config=TrainConfig(epochs=1), device="cpu")
    evaluate(carryon, world.cache_path, device="cpu")
    Cache(world.cache_path)


def test_a_home_that_cannot_be_written_is_no_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(world.base_path, tmp_path / "base")
    os.utime(base / "model.safetensors", (1, 1))  # old enough for its hash to be stored
    (tmp_path / "home").write_text("a file in place of a folder")
    monkeypatch.setenv("EMBEDCACHE_HOME", str(tmp_path / "home"))
    assert load_identity(base).fingerprint == world.base().identity.fingerprint
