"""Batches of several epochs as one stream: reading ahead, memory, errors and closing."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from embedcache.data import loader as loader_module
from embedcache.data import order as order_module
from embedcache.data.batch import Batch
from embedcache.data.loader import BatchLoader
from embedcache.data.prefetch import look_ahead

SEED = 5


@pytest.fixture(params=[1, 8, 20])
def split(request, world, monkeypatch):
    """The train split, of 10 blocks, in windows of one block, of several and of all."""
    monkeypatch.setattr(order_module, "WINDOW", request.param)
    return world.cache().split("train")


@pytest.fixture(params=[0, 2])
def packers(request, monkeypatch):
    monkeypatch.setattr(loader_module, "PACKING_THREADS", {"cpu": request.param})


def loader(split, **settings) -> BatchLoader:
    return BatchLoader(split, **{"batch_tokens": 60, "taps": ("final",), "seed": SEED} | settings)


def room(blocks: int, split) -> dict[str, int]:
    """Settings that keep so many blocks from one epoch to the next."""
    return {"kept_bytes": blocks * split.block_bytes(("final",))}


def content(batch: Batch | None) -> object:
    """Return the content of a batch, for comparison."""
    if batch is None:
        return None
    tensors = (batch.ids_BT, batch.positions_BT, batch.targets_N, *batch.x_BTH.values())
    return batch.sequences, batch.last_part, *(tensor.tolist() for tensor in tensors)


def windows(split, epoch: int) -> list[list[int]]:
    """Return the blocks of an epoch's windows, by a plain implementation."""
    blocks = np.random.default_rng([SEED, epoch]).permutation(split.manifest.blocks).tolist()
    return [blocks[at : at + order_module.WINDOW] for at in range(0, 10, order_module.WINDOW)]


def reads(split, monkeypatch) -> list[int]:
    """Return a list of the blocks that are read from now on, one at a time."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    found: list[int] = []
    stored = type(split).stored
    monkeypatch.setattr(
        type(split), "stored", lambda self, *given: found.append(given[0]) or stored(self, *given)
    )
    return found


def again(found: list[int], expected: set[int]) -> set[int]:
    """Wait until the expected blocks were read a second time; return all that were."""
    stop = time.perf_counter() + 5
    while True:
        read = set(Counter(found) - Counter(range(10)))
        if expected <= read or time.perf_counter() > stop:
            time.sleep(0.05)  # were there more to come
            return set(Counter(found) - Counter(range(10)))
        time.sleep(0.01)


@dataclass
class Numbered:
    """A batch and what a caller makes of it."""

    batch: Batch
    number: int

    def tensors(self) -> list[torch.Tensor]:
        return self.batch.tensors()


@pytest.mark.parametrize(
    ("ranks", "part_tokens", "epoch", "skip"),
    [(1, None, 0, 0), (1, 40, 2, 3), (3, None, 2, 3), (3, 40, 1, 999)],
)
def test_a_stream_is_epoch_by_epoch(split, packers, ranks, part_tokens, epoch, skip):
    settings = {"ranks": ranks, "part_tokens": part_tokens} | room(3, split)
    for rank in range(ranks):
        one, number = loader(split, rank=rank, **settings), itertools.count()
        expected = []
        for at in range(3):
            expected += [*map(content, one.epoch(epoch + at, skip=0 if at else skip)), None]
        found = [*one.epochs(range(epoch, epoch + 3), skip=skip)]
        assert [content(batch) for batch in found] == expected
        assert expected.count(None) == 3 and len(expected) > 9
        prepared = one.epochs(
            range(epoch, epoch + 3),
            skip=skip,
            prepare=lambda batch, number=number: Numbered(batch, next(number)),
        )
        count = 0
        for item, batch in zip(prepared, found, strict=True):
            assert (item is None) == (batch is None)
            if item is not None:
                assert (item.number, item.batch.sequences) == (count, batch.sequences)
                count += 1


def test_the_next_epoch_is_read_while_the_last_window_is_in_use(split, monkeypatch):
    last, (first, *others) = windows(split, 0)[-1], windows(split, 1)
    home = {s: b for b in range(10) for s in split.sequences(b)[0].tolist()}
    used = [{home[s] for s in batch.sequences} for batch in loader(split).epoch(0)]
    # The first batch of the last window may hold blocks of the window before.
    begin = next(n for n, blocks in enumerate(used) if blocks & set(last))
    expected = set(first) - set().union(*used[max(begin - 1, 0) :])
    found = reads(split, monkeypatch)
    stream = loader(split).epochs(range(2))
    assert all(next(stream) for _ in used[:-1])
    assert expected <= again(found, expected) <= set(first)
    assert next(stream) is not None
    assert again(found, expected) <= set(first)
    # The last window's blocks are freed; two windows of the next epoch are read meanwhile.
    assert next(stream) is None
    expected |= set(others[0] if others else [])
    assert expected <= again(found, expected) <= {*first, *expected}
    stream.close()


def test_an_epoch_of_one_window_is_read_once(split, monkeypatch):
    found = reads(split, monkeypatch)
    batches = list(loader(split).epochs(range(4)))
    assert batches.count(None) == 4
    assert len(found) == 10 if order_module.WINDOW == 20 else len(found) > 10


@pytest.mark.parametrize("kept", [3, 10])
def test_kept_blocks_are_read_once(split, kept, monkeypatch):
    found = reads(split, monkeypatch)
    list(loader(split, **room(kept, split)).epochs(range(4)))
    once = [block for block in range(10) if found.count(block) == 1]
    assert len(once) == (10 if order_module.WINDOW == 20 else kept)


@pytest.mark.parametrize(("free", "together"), [(1 << 40, 1 << 30), (800 << 20, 100 << 20)])
def test_loaders_share_the_memory_of_kept_blocks(free, together, monkeypatch):
    """All keep 1 GiB together, or an eighth of the free memory if that is less."""
    monkeypatch.setattr(loader_module, "free_memory", lambda device: free)
    assert loader_module.kept_bytes_per_loader(1) == together
    assert loader_module.kept_bytes_per_loader(64) == together // 64


@pytest.mark.parametrize("batches", [1, 20, "end"])
def test_closing_stops_every_thread_and_cancels_reads(split, packers, batches, monkeypatch):
    before = set(threading.enumerate())
    found = reads(split, monkeypatch)
    noted = type(split).stored
    monkeypatch.setattr(type(split), "stored", lambda *given: time.sleep(0.02) or noted(*given))
    stream = loader(split).epochs(range(100))
    if batches == "end":
        assert None in stream
    else:
        assert None not in [*map(content, itertools.islice(stream, batches))]
    begun = len(found)
    stream.close()
    assert set(threading.enumerate()) == before
    assert len(found) <= begun + 3  # of ten or more requested, in windows of 8 and 20
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("split", [1, 8], indirect=True)  # with 20, no block is read twice
def test_a_damaged_block_of_the_next_epoch_is_an_error_at_its_batch(split, packers, monkeypatch):
    damaged = next(b for b in windows(split, 1)[0] if b not in windows(split, 0)[-1])
    inside = set(split.sequences(damaged)[0].tolist())
    found, stored = [], type(split).stored
    whole = [content(batch) for batch in loader(split).epochs(range(2))]
    end = whole.index(None)
    due = next(n for n in range(end + 1, len(whole)) if inside & set(whole[n][0]))

    def broken(self, number, *more):
        found.append(number)
        if number == damaged and found.count(number) > 1:
            raise OSError("the disk is gone")
        return stored(self, number, *more)

    monkeypatch.setattr(type(split), "stored", broken)
    stream = loader(split).epochs(range(2))
    assert [content(next(stream)) for _ in range(due)] == whole[:due]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    found.clear()
    stream = loader(split).epochs(range(2))
    assert [content(next(stream)) for _ in range(end + 1)] == whole[: end + 1]
    stream.close()  # the batch was not asked for


def test_look_ahead_raises_in_the_place_of_the_item():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    for depth in range(4):
        found = look_ahead(items(), depth)
        assert [next(found), next(found)] == [1, 2]
        with pytest.raises(KeyError, match="third"):
            next(found)


@pytest.mark.parametrize("split", [2], indirect=True)
def test_reading_begins_before_a_batch_is_asked_for(split, monkeypatch):
    found = reads(split, monkeypatch)
    stream = loader(split).epochs(range(2))
    ends = time.monotonic() + 10
    while len(set(found)) < 2 and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(found) == len(set(found)) == 2  # those of one window
    stream.close()
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]
