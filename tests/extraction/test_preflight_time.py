"""The time that stage one says beforehand, wherever it goes: forward, coding, writing, base."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures_extract import corpus_config, small_settings, write_documents
from support.spinning import spin
from support.tiny import tiny_base_directory

from embedcache.base.forward import CHECK_EVERY, BlockForward
from embedcache.cache import base_arrays
from embedcache.cache.blocks import commit
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.extraction import measure, pipeline, preview, rehearsal
from embedcache.extraction import run as stage_one
from embedcache.extraction.extract import extract
from embedcache.extraction.measure import Measured
from embedcache.extraction.rehearsal import Encoded
from embedcache.extraction.timing import blocks_seconds, pipeline_seconds

pytestmark = pytest.mark.usefixtures("measured_in_full")


@pytest.mark.parametrize(
    ("stages", "threads", "seconds"),
    [
        ([], 4, 0.0),
        ([(1.0, 0.5)] * 10, 1, 10.5),  # the first stage is the limit: the last block is drained
        ([(0.5, 1.0)] * 10, 1, 10.5),  # the second is: it waits for the first block
        ([(0.5, 4.0)] * 8, 4, 10.0),  # two rounds, begun one after the other
        ([(0.5, 4.0)] * 2, 4, 5.0),  # fewer blocks than threads
        ([(1.0, 0.0), (1.0, 9.0), (1.0, 1.0)], 2, 11.0),  # one that takes long
    ],
)
def test_a_pipeline_takes_what_it_takes_by_hand(
    stages: list[tuple[float, float]], threads: int, seconds: float
) -> None:
    assert pipeline_seconds(stages, threads) == pytest.approx(seconds)


def encoded(row: float = 0.0, commit: float = 0.0, late: float = 0.0) -> Encoded:
    return Encoded(
        row_bytes=1.0,
        block_bytes=1.0,
        row_seconds=row,
        commit_seconds=commit,
        late_seconds=late,
        arrays=(),
    )


def test_the_model_of_a_run_by_given_measurements() -> None:
    """Ten blocks of 1,000 tokens; 2 positions a token of 1 ms; then what comes on top."""
    todo = [("train", block) for block in range(10)]

    def seconds(known: Any = None, threads: int = 2, **given: Any) -> float:
        measured = Measured(
            position_seconds=0.001,
            padding=2.0,
            threads=threads,
            check_seconds=given.pop("check", 0.0),
            encoded={"train": encoded(**given)},
        )
        return blocks_seconds({"train": 10_000}, todo, measured, known or {})

    assert seconds() == pytest.approx(20.0)
    assert seconds(check=0.1) == pytest.approx(20.2)  # the first block's two sequences
    assert seconds(row=0.001) == pytest.approx(30.0)
    assert seconds(commit=0.001) == pytest.approx(21.0)
    assert seconds(commit=0.008, threads=4) == pytest.approx(2 * 1 + 3 * 8 + 2)
    assert seconds(commit=0.001, late=0.0005) == pytest.approx(26.0)
    batch = {"final": torch.empty(5, 1000, 3)}
    known = {("train", 3): {0: batch, 1: batch}, ("train", 99): {0: batch}}
    assert seconds(known=known) == pytest.approx(10.0)
    # What is late beside commits is batches: of those known, none is; nor do they take less than
    # no time where others happened to be faster beside them.
    assert seconds(known=known, row=0.001, late=0.0005) == pytest.approx(22.5)
    assert seconds(known=known, row=0.001, late=-0.0005) == pytest.approx(17.5)
    assert seconds(row=0.001, late=-0.005) == pytest.approx(10.0)
    many = [("train", block) for block in range(CHECK_EVERY + 1)]
    measured = Measured(position_seconds=1.0, check_seconds=2.0, encoded={"train": encoded()})
    tokens = {"train": len(many)}
    assert blocks_seconds(tokens, many, measured, {}) == pytest.approx(len(many) + 6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base whose token embedding is not its head, and a corpus of some 20 blocks."""
    root = tmp_path_factory.mktemp("time")
    tiny_base_directory(root / "base", "llama", tied=False)
    write_documents(root / "corpus", 20, words=150)
    return root


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **more)

    return slow


def quick(patch: pytest.MonkeyPatch) -> None:
    """Let cores and disk, which others use too, take next to nothing."""

    def batch(self: BlockForward, ids_N: Any, rows_B2: Any) -> dict[str, torch.Tensor]:
        width = self.positions(rows_B2) // len(rows_B2)
        return {"final": torch.linspace(-1, 1, 32).expand(len(rows_B2), width, 32).clone()}

    patch.setattr(BlockForward, "batch", batch)
    patch.setattr(BlockForward, "check", lambda *_: 0.0)
    patch.setattr(os, "fsync", lambda descriptor: None)


def slow_writing(patch: pytest.MonkeyPatch) -> None:
    """Let a shard take 60 ms, which is far more than its block's forward pass."""
    patch.setattr(commit, "write_shard", slowed(commit.write_shard, 0.06))


def slow_coding(patch: pytest.MonkeyPatch) -> None:
    """Let four threads commit, of which only one can code at a time, as of one with a lock."""
    guard, real = threading.Lock(), commit.write_shard

    def one_at_a_time(*arguments: Any) -> Any:
        with guard:
            time.sleep(0.06)
        return real(*arguments)

    patch.setattr(commit, "write_shard", one_at_a_time)
    patch.setattr(measure, "is_launched", lambda device: True)  # as of a GPU
    for module in (measure, rehearsal, pipeline):
        patch.setattr(module, "encoder_threads", lambda device: 4)


def slow_flushing(patch: pytest.MonkeyPatch) -> None:
    """Let each of the several flushes of a commit take 15 ms: of folders and markers, too."""
    patch.setattr(commit, "fsync_path", slowed(commit.fsync_path, 0.015))


def slow_base(patch: pytest.MonkeyPatch) -> None:
    """Let the head and the token embedding be of 24 chunks each, of 60 ms."""
    patch.setattr(base_arrays, "CHUNK_ROWS", 16)
    patch.setattr(base_arrays, "write_chunk", slowed(base_arrays.write_chunk, 0.06))


def slow_calibrating(patch: pytest.MonkeyPatch) -> None:
    """Let calibrating take a second and a half."""
    for module in (stage_one, preview):
        patch.setattr(module, "calibrations_of", slowed(module.calibrations_of, 1.5))


@pytest.mark.parametrize(
    "slow",
    [
        slow_writing,
        slow_base,
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (slow_coding, slow_flushing, slow_calibrating)
        ),
    ],
)
def test_time_is_predicted_within_a_fifth_where_the_forward_pass_is_not_the_limit(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slow: Callable[[pytest.MonkeyPatch], None],
) -> None:
    quick(monkeypatch)
    slow(monkeypatch)
    corpus, out = corpus_config(place / "corpus"), tmp_path / "cache"
    asked: dict[str, Any] = {"base": str(place / "base"), "out": out, "device": "cpu"}
    asked["settings"] = small_settings(codec="int8")
    beforehand, _ = preview.preview(corpus, **asked)
    started = time.perf_counter()
    summary = extract(corpus, **asked)
    assert summary.seconds < time.perf_counter() - started
    assert summary.seconds > 1
    assert abs(summary.predicted_seconds / summary.seconds - 1) < 0.2
    assert abs(beforehand.seconds / summary.seconds - 1) < 0.2
    assert summary.tokens_per_second == pytest.approx(
        sum(summary.tokens.values()) / summary.seconds, rel=1e-3
    )
    assert read_manifest(out).extracted["predicted_seconds"] == summary.predicted_seconds


@pytest.mark.slow  # of time that passes: for a machine that has nothing else to do
@pytest.mark.parametrize(
    ("launching", "computing", "locked"),
    [(0.02, 0.0, 0.0), (0.02, 0.0, 0.015), (0.0, 4e-5, 0.02)],
    ids=["launched", "locked", "computed"],
)
def test_time_is_predicted_within_a_fifth_where_a_thread_launches_what_a_device_computes(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launching: float,
    computing: float,
    locked: float,
) -> None:
    """As on a GPU: a batch takes a thread's time or that of its positions, some blocks end in a
    small one, and four threads that commit hold the interpreter's lock for some time of a shard.
    """
    quick(monkeypatch)
    batch, write_shard = BlockForward.batch, commit.write_shard

    def launch(self: BlockForward, ids_N: Any, rows_B2: Any) -> Any:
        spin(launching)
        time.sleep(computing * self.positions(rows_B2))
        return batch(self, ids_N, rows_B2)

    def write(*arguments: Any) -> Any:
        spin(locked)
        time.sleep(0.02)
        return write_shard(*arguments)

    monkeypatch.setattr(BlockForward, "batch", launch)
    monkeypatch.setattr(commit, "write_shard", write)
    monkeypatch.setattr(measure, "is_launched", lambda device: True)
    for module in (measure, rehearsal, pipeline):
        monkeypatch.setattr(module, "encoder_threads", lambda device: 4)
    corpus = corpus_config(write_documents(tmp_path / "corpus", 200, words=200))
    settings = small_settings(block_tokens=1024, batch_tokens=1024)
    asked: dict[str, Any] = {"base": str(place / "base"), "device": "cpu", "settings": settings}
    summary = extract(corpus, out=tmp_path / "cache", **asked)
    assert summary.seconds > 2
    assert abs(summary.predicted_seconds / summary.seconds - 1) < 0.2
