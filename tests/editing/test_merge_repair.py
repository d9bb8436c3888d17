"""A merged cache is repaired as it is: from the tokens it holds, without a corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cache_faults import names_in, served
from support.fixtures_extract import call_main, content, corpus_config, flip_byte, small_settings
from support.tiny import tiny_base_directory

from embedcache.cache.format.layout import MANIFEST, marker_path
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.cache.verify import verify
from embedcache.editing.merge import merge
from embedcache.editing.repair import repair
from embedcache.errors import CacheError, IdentityError
from embedcache.extraction.extract import extract
from embedcache.store.files import hash_file

SHARDS = [
    "train/embeddings/final/c/0/0",
    "train/scale/layer_1/c/{last}",
    "dev/embeddings/layer_1/c/{last}/0",
]
TOKENS = "train/tokens/ids/c/1"


@pytest.fixture(scope="module")
def merged(
    caches: dict[str, Path],
    more: Path,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two caches in one: int8, two taps."""
    root = tmp_path_factory.mktemp("merged")
    settings = small_settings(codec="int8", taps=("final", "layer_1"))
    request: dict[str, Any] = {"base": str(tiny_base), "settings": settings, "device": "cpu"}
    extract(corpus_config(more), out=root / "other", **request)
    merge([caches["int8"], root / "other"], root / "both")
    return root / "both"


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(merged, tmp_path / "both")


def mend(out: Path, base: Path, **more: Any) -> Any:
    return repair(out, base=base, device="cpu", **more)


def shards(cache: Path) -> list[str]:
    """Return shards of both caches that were merged, of the first and the last block."""
    splits = read_manifest(cache).splits
    return [name.format(last=splits[name.partition("/")[0]].blocks - 1) for name in SHARDS]


def restored(out: Path, merged: Path) -> None:
    assert content(out) == content(merged)
    assert verify(out, deep=True).faults == ()
    assert served(out) == served(merged)


@pytest.mark.parametrize("harm", [flip_byte, Path.unlink], ids=["flipped", "gone"])
def test_damaged_blocks_come_out_as_they_were(
    out: Path, merged: Path, tiny_base: Path, harm: Any
) -> None:
    before = {name: (out / name).stat().st_ino for name in names_in(out)}
    damaged = shards(out)
    for name in damaged:
        harm(out / name)
    with pytest.raises(CacheError, match=r"`embedcache\.repair\("):
        served(out)
    summary = mend(out, tiny_base)
    restored(out, merged)
    assert summary.computed_blocks == 3
    assert summary.corpus["documents"] == {
        name: split.documents for name, split in read_manifest(merged).splits.items()
    }
    same = {name for name in names_in(out) if before.get(name) == (out / name).stat().st_ino}
    assert {"train/embeddings/final/c/1/0", TOKENS, "tokens.json"} <= same
    assert not same & {*damaged}


def test_all_else_that_needs_no_corpus_is_mended(out: Path, merged: Path, tiny_base: Path) -> None:
    for name in (
        "base/head/weight/c/0/0",
        "digests/train/tokens",
        "digests/dev/embeddings",
    ):
        flip_byte(out / name)
    for name in ("zarr.json", "train/zarr.json"):
        (out / name).write_text("{}")
    marker_path(out, "train", 1).unlink()
    (out / "tokens.json").unlink()
    assert mend(out, tiny_base).computed_blocks == 0
    restored(out, merged)


def test_one_whose_manifest_is_gone_is_repaired(out: Path, merged: Path, tiny_base: Path) -> None:
    (out / MANIFEST).unlink()
    flip_byte(out / shards(merged)[1])
    mend(out, tiny_base)
    restored(out, merged)


def test_tokens_are_not_made_up_and_nothing_is_changed(out: Path, tiny_base: Path) -> None:
    for name in (TOKENS, shards(out)[0]):
        flip_byte(out / name)
    before = {name: hash_file(out / name) for name in names_in(out)}
    with pytest.raises(CacheError, match=r"its tokens are damaged.*Merge them again"):
        mend(out, tiny_base)
    assert {name: hash_file(out / name) for name in names_in(out)} == before


def test_one_that_was_not_merged_is_repaired_by_what_it_says_of_itself(
    caches: dict[str, Path], copied: Path, tiny_base: Path
) -> None:
    for name in (TOKENS, shards(copied)[0]):
        flip_byte(copied / name)
    mend(copied, tiny_base)
    restored(copied, caches["int8"])


def test_the_command_needs_no_corpus(
    out: Path,
    merged: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip_byte(out / shards(out)[2])
    command = ["extract", "--out", str(out), "--base", str(tiny_base), "--device", "cpu"]
    assert call_main(monkeypatch, *command) == 2
    assert "expected a CORPUS" in capsys.readouterr().err
    assert call_main(monkeypatch, *command, "--repair", "--codec", "int8") == 2
    assert "found --codec" in capsys.readouterr().err
    assert call_main(monkeypatch, *command, "--repair") == 0
    assert "1 computed here" in capsys.readouterr().out
    restored(out, merged)


def test_what_is_not_the_caches_is_refused(out: Path, tmp_path: Path) -> None:
    other = tiny_base_directory(tmp_path / "base", seed=1)
    with pytest.raises(IdentityError, match="They differ in: weights"):
        mend(out, other)
