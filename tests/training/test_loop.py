"""The streams of batches that a loop takes from: when they end, and how waiting for them counts."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from embedcache.cache.split_reader import SplitReader
from embedcache.carryon.branch.config import BranchConfig
from embedcache.data import loader, order
from embedcache.data.loader import BatchLoader
from embedcache.errors import CacheError
from embedcache.training import loop
from embedcache.training.config import TrainConfig
from embedcache.training.run.checkpoint import METRICS_FILE
from embedcache.training.scoring import DevLoss
from embedcache.training.step import timestamps
from embedcache.training.step.batch_stream import BatchStream
from embedcache.training.step.stack import Stack
from embedcache.training.sweep import sweep
from embedcache.training.train import train
from embedcache.training.trainer import Trainer

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32), epochs=3, batch_tokens=256, lr=5e-3, loss="exact"
)


@pytest.fixture
def streams(monkeypatch) -> list:
    """The streams over epochs that are begun, kept: that nobody has them left closes none."""
    found, epochs = [], BatchLoader.epochs

    def kept(self, span, **more):
        stream = epochs(self, span, **more)
        if self._split.name == "train":
            found.append((span, stream))
        return stream

    monkeypatch.setattr(BatchLoader, "epochs", kept)
    return found


def closed(streams) -> bool:
    return all(inspect.getgeneratorstate(one) == inspect.GEN_CLOSED for _, one in streams)


def test_one_stream_gives_all_epochs_and_is_closed(world, tmp_path, streams):
    train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert [span for span, _ in streams] == [range(3)]
    assert closed(streams)


def test_the_first_batches_are_read_while_the_base_is_scored(world, tmp_path, streams, monkeypatch):
    begun, score = [], Trainer.score

    def scored(self, run, stack, *more):
        begun.append((stack is None, len(streams)))
        return score(self, run, stack, *more)

    monkeypatch.setattr(Trainer, "score", scored)
    train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert begun[0] == (True, 1)


def test_early_stopping_closes_the_stream(world, tmp_path, streams, monkeypatch):
    monkeypatch.setattr(Trainer, "score", lambda *_: [DevLoss(1.0)])
    config = replace(CONFIG, epochs=9, patience=2)
    result = train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert result.epochs == 3
    assert closed(streams)


def test_each_feed_s_stream_ends_with_its_last_member(world, tmp_path, streams, monkeypatch):
    open_ones, end = [], BatchStream.close

    def noted(self):
        end(self)
        open_ones.append(sum(not closed([one]) for one in streams))

    monkeypatch.setattr(BatchStream, "close", noted)
    runs = {
        tmp_path / "short": replace(CONFIG, epochs=1),
        tmp_path / "long": replace(CONFIG, epochs=3),
        tmp_path / "fails": replace(CONFIG, lr=1e30, order_seed=1),
        tmp_path / "other": replace(CONFIG, epochs=2, order_seed=2),
    }
    found = sweep(world.cache_path, runs=runs, device="cpu")
    assert [result.failure is None for result in found] == [True, True, False, True]
    assert sorted(span.stop for span, _ in streams) == [2, 3, 3]
    assert open_ones[:3] == [2, 1, 0]  # the failed one's first


def test_an_error_elsewhere_closes_the_streams(world, tmp_path, streams, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "finish", interrupted)
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in (0, 1)}
    with pytest.raises(KeyboardInterrupt):
        sweep(world.cache_path, runs=runs, device="cpu")
    assert len(streams) == 2 and closed(streams)


def test_those_of_several_orders_share_the_room_to_keep_blocks_in(world, tmp_path, monkeypatch):
    kept, made = [], Trainer._stream

    def noted(self, runs, settings, kept_bytes):
        kept.append(kept_bytes)
        return made(self, runs, settings, kept_bytes)

    monkeypatch.setattr(loader, "KEPT_BYTES", 100)
    monkeypatch.setattr(Trainer, "_stream", noted)
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    assert not any(one.failure for one in sweep(world.cache_path, runs=runs, device="cpu"))
    assert kept == [33, 33, 33]


def test_a_damaged_block_of_the_next_epoch_is_told_of_then(world, tmp_path, streams, monkeypatch):
    stored, reads = SplitReader.stored, []

    def damaged(self, number, taps, *more):
        if self.name == "train" and streams:
            reads.append(number)
        if self.name == "train" and number == 3 and reads.count(3) == 2:
            raise CacheError("damaged in the second epoch")
        return stored(self, number, taps, *more)

    monkeypatch.setattr(order, "WINDOW", 1)
    monkeypatch.setattr(SplitReader, "stored", damaged)
    monkeypatch.setattr(loader, "KEPT_BYTES", 0)  # it is read again
    with pytest.raises(CacheError, match="damaged in the second epoch"):
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert closed(streams)
    rows = [json.loads(row) for row in (tmp_path / "c" / METRICS_FILE).read_text().splitlines()]
    assert [row["epoch"] for row in rows if "train_loss" in row] == [1]


def test_waiting_for_an_epoch_s_first_batch_counts_and_scoring_does_not(
    world, tmp_path, monkeypatch
):
    score, epochs, finish, now = Trainer.score, BatchLoader.epochs, Stack.finish, [0]

    def take(seconds):
        now[0] += seconds

    def slow_start(self, span, **more):
        first = self._split.name == "train"
        for batch in epochs(self, span, **more):
            take(7 if first else 0)
            first = batch is None and self._split.name == "train"
            yield batch

    for module in (loop, timestamps):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Trainer, "score", lambda *given: take(10_000) or score(*given))
    monkeypatch.setattr(Stack, "finish", lambda *given: take(100) or finish(*given))
    monkeypatch.setattr(BatchLoader, "epochs", slow_start)
    result = train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert result.seconds == 100 * result.steps + 3 * 7
    assert result.data_wait == round(3 * 7 / result.seconds, 4)


def test_batches_are_let_go_of_before_they_are_differentiated(world, tmp_path, monkeypatch):
    """What is copied of them is all that a recording needs."""
    streams, seen, prepared, init = [], [], Stack.prepared, BatchStream.__init__

    def kept(self, *given):
        streams.append(self)
        init(self, *given)

    def checked(self, work):
        differentiate = prepared(self, work)
        return lambda: seen.append([stream.due for stream in streams]) or differentiate()

    monkeypatch.setattr(BatchStream, "__init__", kept)
    monkeypatch.setattr(Stack, "prepared", checked)
    runs = {tmp_path / str(seed): replace(CONFIG, epochs=1, seed=seed) for seed in (0, 1)}
    assert not any(one.failure for one in sweep(world.cache_path, runs=runs, device="cpu"))
    assert len(streams) == 2 and seen and all(one == [None, None] for one in seen)
