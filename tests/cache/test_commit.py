"""Blocks are committed whole and once, wherever a process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stopping import KilledError, killed

from embedcache.cache.blocks import commit
from embedcache.cache.blocks.commit import (
    BlockWriter,
    Marker,
    clear_staging,
    committed_blocks,
    recover,
)
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS
from embedcache.cache.format.layout import COMMITS, marker_path
from embedcache.cache.shards.shard import read_shard
from embedcache.errors import CacheError
from embedcache.store.files import STAGING, hash_file

Array = np.ndarray[Any, Any]
(SPEC,) = ARRAYS["bf16"]
NAME = "train/embeddings/final/c/0/0"


def values(seed: int, rows: int = 16) -> Array:
    return np.random.default_rng(seed).integers(0, 65536, (rows, 4)).astype(np.uint16)


def commit_block(writer: BlockWriter, seed: int, block: int = 0, **more: Any) -> Marker:
    return writer.commit("train", block, {"embeddings/final": (SPEC, values(seed))}, **more)


def recovered(cache: Path, blocks: int) -> dict[int, Marker]:
    return {marker.block: marker for marker in recover(cache, "train", blocks)}


def stored(cache: Path, block: int = 0) -> Array:
    path = cache / f"train/embeddings/final/c/{block}/0"
    return read_shard(
        path,
        rows=16,
        columns=(4,),
        dtype="uint16",
        chunk_rows=16,
        chunks=1,
        coder=CODERS[SPEC.coder],
    )


def check_files(cache: Path, marker: Marker) -> None:
    for record in marker.files:
        assert (cache / record.path).stat().st_size == record.bytes
        assert hash_file(cache / record.path) == record.sha256


def test_a_committed_block_is_in_place_with_its_marker(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path)
    marker = commit_block(writer, 1, quarantined=(3,))
    writer.close()
    check_files(tmp_path, marker)
    assert np.array_equal(stored(tmp_path), values(1))
    assert Marker.read(marker_path(tmp_path, "train", 0)) == marker
    assert marker.quarantined == (3,)
    assert recovered(tmp_path, 1) == {0: marker}
    assert not list((tmp_path / STAGING).rglob("*"))


def test_the_writer_that_lost_the_race_harms_nothing(tmp_path: Path) -> None:
    first, second = BlockWriter(tmp_path), BlockWriter(tmp_path)
    winner = commit_block(first, 1)
    assert commit_block(second, 2) == winner
    second.close()
    assert np.array_equal(stored(tmp_path), values(1))
    check_files(tmp_path, winner)
    first.close()
    check_files(tmp_path, winner)


def test_the_loser_of_a_race_moves_the_files_of_a_winner_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after_link(tmp_path, monkeypatch)
    second = BlockWriter(tmp_path)
    winner = commit_block(second, 2)
    second.close()
    assert np.array_equal(stored(tmp_path), values(1))
    check_files(tmp_path, winner)


def killed_after_link(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit block 0 (values 1), killed when its marker is linked and no file is moved."""

    def link(source: Path, target: Path) -> None:
        real_link(source, target)
        raise KilledError

    real_link = os.link
    with monkeypatch.context() as patch:
        patch.setattr(commit.os, "link", link)
        with pytest.raises(KilledError):
            commit_block(BlockWriter(cache), 1)
    assert marker_path(cache, "train", 0).is_file()
    assert not (cache / NAME).exists()


def test_recovery_moves_committed_files_from_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after_link(tmp_path, monkeypatch)
    done = recovered(tmp_path, 1)
    clear_staging(tmp_path)
    assert list(done) == [0]
    check_files(tmp_path, done[0])
    assert np.array_equal(stored(tmp_path), values(1))
    assert recovered(tmp_path, 1) == done  # and again, with nothing left to do


def test_killed_before_the_link_leaves_nothing_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(commit.os, "link", killed)
        with pytest.raises(KilledError):
            commit_block(BlockWriter(tmp_path), 1)
    assert recovered(tmp_path, 1) == {}
    clear_staging(tmp_path)
    assert not (tmp_path / "train").exists()
    marker = commit_block(BlockWriter(tmp_path), 2)
    check_files(tmp_path, marker)
    assert np.array_equal(stored(tmp_path), values(2))


def test_killed_between_two_promotions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_folder(path: Path) -> None:
        if "layer_1" in path.parts:
            raise KilledError
        real(path)

    real = commit.make_folder
    arrays = {f"embeddings/{tap}": (SPEC, values(n)) for n, tap in ((1, "final"), (2, "layer_1"))}
    with monkeypatch.context() as patch:
        patch.setattr(commit, "make_folder", make_folder)
        with pytest.raises(KilledError):
            BlockWriter(tmp_path).commit("train", 0, arrays)
    assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME.replace("final", "layer_1")).exists()
    done = recovered(tmp_path, 1)
    assert list(done) == [0]
    check_files(tmp_path, done[0])


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_marker_whose_files_are_incomplete_is_removed(tmp_path: Path, harm: str) -> None:
    writer = BlockWriter(tmp_path)
    commit_block(writer, 1)
    kept = commit_block(writer, 2, block=1)
    if harm == "missing":
        (tmp_path / NAME).unlink()
    else:
        os.truncate(tmp_path / NAME, 20)
    assert recovered(tmp_path, 2) == {1: kept}
    assert not marker_path(tmp_path, "train", 0).exists()
    again = commit_block(BlockWriter(tmp_path), 1)
    check_files(tmp_path, again)
    assert np.array_equal(stored(tmp_path), values(1))


def test_the_highest_generation_of_a_marker_counts(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path)
    commit_block(writer, 1)
    newest = [commit_block(writer, seed, generation=seed) for seed in (2, 10)][-1]
    assert recovered(tmp_path, 1) == {0: newest}
    assert np.array_equal(stored(tmp_path), values(10))


def test_markers_of_another_cache_are_refused(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path)
    commit_block(writer, 1, block=5)
    with pytest.raises(CacheError, match=r"mixes two caches"):
        recovered(tmp_path, 3)
    place = marker_path(tmp_path, "train", 5)
    place.rename(marker_path(tmp_path, "train", 1))
    with pytest.raises(CacheError, match=r"marks block 5"):
        recovered(tmp_path, 6)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 3}', "\xff"])
def test_a_damaged_marker_is_refused(tmp_path: Path, text: str) -> None:
    commit_block(BlockWriter(tmp_path), 1)
    marker_path(tmp_path, "train", 0).write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=r"`embedcache\.repair\(\)`"):
        recovered(tmp_path, 1)


def test_other_files_beside_markers_are_ignored(tmp_path: Path) -> None:
    commit_block(BlockWriter(tmp_path), 1)
    for name in (".DS_Store", "notes.json", "00000001.0.json.swp"):
        (tmp_path / COMMITS / "train" / name).write_text("?")
    assert list(committed_blocks(tmp_path, "train")) == [0]
    assert committed_blocks(tmp_path, "dev") == {}


def before(monkeypatch: pytest.MonkeyPatch, name: str, act: Any) -> None:
    """Call ``act`` once, before the next call of a function of `commit`."""
    real = getattr(commit, name)

    def late(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(commit, name, real)
        act()
        return real(*arguments, **more)

    monkeypatch.setattr(commit, name, late)


@pytest.mark.parametrize("step", ["write_shard", "chunks_crc32c", "make_folder"])
def test_blocks_whose_staging_folder_was_removed_are_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    writer = BlockWriter(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        before(patch, step, lambda: clear_staging(tmp_path))
        commit_block(writer, 1)
    assert committed_blocks(tmp_path, "train") == {}
    with pytest.raises(FileNotFoundError):
        commit_block(writer, 1)
    with pytest.raises(FileNotFoundError):
        writer.renew("train", 0, (), quarantined=(), generation=1)
    clear_staging(tmp_path)  # removes the folder that writing a shard made anew
    with pytest.raises(FileNotFoundError):
        BlockWriter(tmp_path, attempt=writer.attempt)
    assert committed_blocks(tmp_path, "train") == {}


def test_a_marker_whose_files_were_removed_before_they_were_moved_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = BlockWriter(tmp_path)
    before(monkeypatch, "promote", lambda: clear_staging(tmp_path))
    with pytest.raises(FileNotFoundError, match="was removed"):
        commit_block(writer, 1)
    assert committed_blocks(tmp_path, "train") == {}


def test_clearing_renames_a_staging_folder_before_removing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that wakes meanwhile finds all of its files, or none."""
    dead, live = BlockWriter(tmp_path), BlockWriter(tmp_path)
    commit_block(live, 1)
    folder = tmp_path / STAGING / dead.attempt
    (folder / "staged").touch()
    real, seen = commit.shutil.rmtree, []

    def removing(path: Path, **more: Any) -> None:
        seen.append(folder.exists())
        real(path, **more)

    monkeypatch.setattr(commit.shutil, "rmtree", removing)
    clear_staging(tmp_path, {live.attempt})
    assert seen == [False]
    assert [path.name for path in (tmp_path / STAGING).iterdir()] == [live.attempt]
    clear_staging(tmp_path)
    assert not (tmp_path / STAGING).exists()


def test_files_that_could_not_be_moved_stay_in_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(cache: Path, marker: Marker) -> None:
        raise OSError(28, "No space left on device")

    writer = BlockWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "promote", full)
        with pytest.raises(OSError, match="No space"):
            commit_block(writer, 1)
    writer.close()
    assert [marker.block for marker in recover(tmp_path, "train", 1)] == [0]
    assert np.array_equal(stored(tmp_path), values(1))
