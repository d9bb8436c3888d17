"""A repair restores the undisturbed cache, whatever was damaged and wherever it was stopped."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest
from support.cache_faults import harm, names_in, served
from support.digest_tables import blocks_of, files_of, publish_blocks, quarantined
from support.fixtures_extract import flip_byte, small_flags
from support.fixtures_repair import HEAD, SHARD, TOKENS, computed, ones, repaired, restored
from support.forked import ForkedCommand
from support.stopping import KilledError, stopping

from embedcache.cache.blocks import commit
from embedcache.cache.format.layout import MANIFEST, SPLITS, TOKENS_DIGESTS, marker_path
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.cache.verify import verify
from embedcache.editing import repair
from embedcache.errors import CacheError, EmbedcacheError
from embedcache.extraction import prepare, publish
from embedcache.extraction import run as stage_one

pytestmark = pytest.mark.usefixtures("without_trial")


@pytest.mark.parametrize(
    "seed",
    [
        *range(12),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 300)),
    ],
)
def test_a_random_fault_is_repaired(place: Path, out: Path, seed: int) -> None:
    harm(out, seed)
    repaired(place, out)
    restored(place, out)


def identities(cache: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a file is written again, by name."""
    stats = {name: (cache / name).stat() for name in names_in(cache)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_only_damaged_files_are_written_again(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, before = computed(monkeypatch), identities(out)
    flip_byte(out / SHARD)
    (out / "dev/embeddings/layer_1/c/0/0").unlink()
    marker_path(out, "train", 0).unlink()
    flip_byte(out / TOKENS)
    extracted = read_manifest(out).extracted
    summary = repaired(place, out)
    assert len(calls) == 2
    assert read_manifest(out).extracted == extracted
    assert summary.resumed_blocks == summary.blocks - 2
    restored(place, out)
    changed = {name for name, was in identities(out).items() if before.get(name) != was}
    blocks = {
        f"{split}/{kind}/{tap}/c/{block}"
        for split, kind, tap, block in (
            ("train", kind, tap, "2")
            for kind in ("embeddings", "scale")
            for tap in ("final", "layer_1")
        )
    }
    assert {name for name in changed if name.removesuffix("/0") not in blocks} == {
        "commits/train/00000002.0.json",
        "commits/dev/00000000.0.json",
        "commits/train/00000000.0.json",
        "dev/embeddings/final/c/0/0",
        "dev/embeddings/layer_1/c/0/0",
        TOKENS,
        MANIFEST,
        *(f"digests/{split}/embeddings" for split in SPLITS),
    }


def test_a_sound_cache_is_left_unchanged(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, before = computed(monkeypatch), identities(out)
    repaired(place, out)
    assert identities(out) == before
    assert calls == []


def test_an_unfinished_cache_is_repaired_and_finished(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = computed(monkeypatch)
    (out / MANIFEST).unlink()
    marker_path(out, "train", 1).unlink()
    flip_byte(marker_path(out, "train", 3))
    flip_byte(out / SHARD)
    flip_byte(out / HEAD)
    flip_byte(out / TOKENS)
    (out / "zarr.json").unlink()
    repaired(place, out)
    assert len(calls) == 3
    restored(place, out)


def test_many_faults_at_once(place: Path, out: Path) -> None:
    for name in names_in(out):
        if name.startswith(("digests/", "base")) or "/tokens/" in name or "/documents/" in name:
            (out / name).unlink()
        elif name.endswith("zarr.json"):
            (out / name).write_text("{}")
        elif name.endswith("0"):
            flip_byte(out / name)
    (out / TOKENS_DIGESTS).unlink()
    repaired(place, out)
    restored(place, out)


STEPS = [
    pytest.param(repair, "publish_bytes", 2, id="metadata is being restored"),
    pytest.param(repair, "tokenise", 1, id="pass 0 is to run again"),
    pytest.param(repair, "fsync_path", 2, id="tokens are being restored"),
    pytest.param(repair, "publish_digests", 1, id="the digests are to be restored"),
    pytest.param(commit.os, "link", 1, id="a lost marker is to be renewed"),
    pytest.param(repair, "newest_generations", 2, id="damaged blocks of train are dropped"),
    pytest.param(repair, "fsync_path", 3, id="the manifest is dropped"),
    pytest.param(prepare, "fsync_tree", 1, id="the base is staged"),
    pytest.param(prepare, "fsync_path", 1, id="the base is in place"),
    pytest.param(commit, "write_shard", 6, id="a shard is to be staged"),
    pytest.param(commit, "promote", 2, id="sound blocks are counted"),
    pytest.param(publish, "publish_manifest", 1, id="all blocks are there"),
    pytest.param(stage_one, "clear_staging", 2, id="the manifest is there"),
    pytest.param(publish, "publish_manifest", 2, id="the manifest is to be amended"),
]


@pytest.mark.parametrize(("module", "name", "call"), STEPS)
def test_a_repair_stopped_at_any_step_loses_nothing_sound_and_resumes(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int
) -> None:
    for damaged in ("zarr.json", "train/zarr.json"):
        (out / damaged).write_text("{}")
    (out / TOKENS_DIGESTS).unlink()
    marker_path(out, "train", 0).unlink()
    for damaged in (SHARD, "dev/embeddings/final/c/0/0", TOKENS, HEAD):
        flip_byte(out / damaged)
    faults = {fault.file for fault in verify(out, deep=True).faults}
    with monkeypatch.context() as patch:
        patch.setattr(commit.BlockWriter, "close", lambda self: None)
        patch.setattr(module, name, stopping(getattr(module, name), call))
        with pytest.raises(KilledError):
            repaired(place, out)
    passing = ("base", "manifest")  # without a manifest nothing vouches for the base
    left = [fault for fault in verify(out, deep=True).faults if fault.kind not in passing]
    # a block whose new marker is linked before its files are in place has all of them to come
    assert all(
        fault.file in faults or (fault.split, fault.block) in (("train", 2), ("dev", 0))
        for fault in left
    )
    with contextlib.suppress(EmbedcacheError):
        assert served(out) == served(place / "undisturbed")
    repaired(place, out)
    restored(place, out)


def test_what_a_stopped_repair_committed_is_not_computed_again(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(out / SHARD)
    blocks = sum(split.blocks for split in read_manifest(out).splits.values())
    with monkeypatch.context() as patch:
        patch.setattr(commit.BlockWriter, "close", lambda self: None)
        patch.setattr(commit, "promote", stopping(commit.promote, blocks))
        with pytest.raises(KilledError):
            repaired(place, out)
    calls = computed(monkeypatch)
    repaired(place, out)
    assert calls == []
    restored(place, out)


def test_a_block_of_a_stopped_repair_that_differs_from_before_stands(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: the block of the stopped repair is whole, but not the manifest's."""
    calls = computed(monkeypatch)
    writer = commit.BlockWriter(out)
    marker = writer.commit("train", 0, ones(), generation=1)
    writer.commit("train", 99, ones())  # and one that this cache has no place for
    writer.close()
    with pytest.raises(CacheError, match="repair"):
        served(out)
    repaired(place, out)
    assert calls == []
    assert files_of(out, "train")[0] == marker.files
    assert verify(out, deep=True).faults == ()
    served(out)


def test_a_killed_repair_resumes(place: Path, out: Path) -> None:
    for name in names_in(out):
        if "/embeddings/final/c/" in name:
            flip_byte(out / name)
    flags = [*small_flags(place / "corpus", place / "base", out), "--codec", "int8"]
    process = ForkedCommand(*flags, "--taps", "final,layer_1", "--repair")
    while (out / MANIFEST).exists() or not list(out.glob("commits/train/*.json")):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    repaired(place, out)
    restored(place, out)


def test_quarantined_sequences_follow_the_new_marker(place: Path, out: Path) -> None:
    """A block that was quarantined because of a hardware fault is read again once repaired."""
    writer = commit.BlockWriter(out)
    marker = writer.commit("train", 0, ones(), quarantined=(0, 1), generation=1)
    writer.close()
    publish_blocks(out, "train", [(marker.files, (0, 1)), *blocks_of(out, "train")[1:]])
    assert quarantined(out, "train") == (0, 1)
    assert verify(out, deep=True).faults == ()
    marker_path(out, "train", 0, 1).unlink()
    marker_path(out, "train", 0).unlink(missing_ok=True)
    repaired(place, out)  # the marker was lost, the files are sound: it is renewed
    assert quarantined(out, "train") == (0, 1)
    flip_byte(out / "train/scale/final/c/0")
    repaired(place, out)
    restored(place, out)
