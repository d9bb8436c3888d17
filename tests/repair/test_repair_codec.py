"""``extract --repair`` of a cache whose codec is calibrated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cache_faults import harm, served
from fixtures_extract import (
    content,
    corpus_config,
    flip_byte,
    small_settings,
    write_documents,
)
from tiny import tiny_base_directory

from embedcache.cache.layout import CODEC
from embedcache.cache.verify import verify
from embedcache.errors import CacheError
from embedcache.extract import extract
from embedcache.extraction import calibrate

INVERSE = f"{CODEC}/final/inverse/c/0/0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base, a corpus, and the cache of an undisturbed run: transform, two taps."""
    root = tmp_path_factory.mktemp("repair-codec")
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", 12, words=120)
    run(root, root / "undisturbed")
    return root


def run(place: Path, out: Path, **more: Any) -> Any:
    return extract(
        corpus_config(place / "corpus"),
        base=str(place / "base"),
        out=out,
        settings=small_settings(codec="transform", taps=("final", "layer_1")),
        device="cpu",
        **more,
    )


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "undisturbed", tmp_path / "cache")


def restored(place: Path, out: Path) -> None:
    assert content(out) == content(place / "undisturbed")
    assert verify(out, deep=True).faults == ()
    assert served(out) == served(place / "undisturbed")


@pytest.mark.parametrize(
    "seed",
    [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))],
)
def test_a_random_fault_is_named_never_served_and_repaired(
    place: Path, out: Path, seed: int
) -> None:
    harm(out, seed)
    assert verify(out, deep=True).faults
    run(place, out, repair=True)
    restored(place, out)


@pytest.mark.parametrize("damage", ["flipped", "missing", "edited", "all"])
def test_a_damaged_calibration_is_named_and_made_again(place: Path, out: Path, damage: str) -> None:
    match damage:
        case "flipped":
            flip_byte(out / INVERSE)
        case "missing":
            (out / INVERSE).unlink()
        case "edited":
            path = out / CODEC / "final" / "zarr.json"
            path.write_text(path.read_text().replace('"step": ', '"step": 2'))
        case "all":
            shutil.rmtree(out / CODEC)
    faults = verify(out, deep=True).faults
    assert {fault.kind for fault in faults} == {"codec"}
    with pytest.raises(CacheError, match="codec"):
        served(out)
    run(place, out, repair=True)
    restored(place, out)


def test_a_calibration_that_comes_out_otherwise_is_not_taken(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(out / INVERSE)
    before = content(out)
    monkeypatch.setattr(calibrate, "RIDGE", 1.0)
    with pytest.raises(CacheError, match="is not the one that blocks were coded with"):
        run(place, out, repair=True)
    after = content(out)
    assert {name for name in before if after.get(name) != before[name]} <= {"manifest.json"}
    monkeypatch.undo()
    run(place, out, repair=True)
    restored(place, out)
