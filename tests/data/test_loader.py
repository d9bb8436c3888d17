"""The loader against the cache's reader: order, packing and targets."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.carryons import change

from embedcache.cache.split_reader import StoredBlock
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.nn.attention import segment_mask
from embedcache.data import loader as loader_module
from embedcache.data import order as order_module
from embedcache.data.batch import Batch
from embedcache.data.loader import BatchLoader
from embedcache.data.packing import pack, pack_rows
from embedcache.data.prefetch import prefetch
from embedcache.errors import UsageError


@pytest.fixture(params=[1, 8])
def split(request, world, monkeypatch):
    """The train split, with windows of one block and of several."""
    monkeypatch.setattr(order_module, "WINDOW", request.param)
    return world.cache().split("train")


def batches(split, epoch=0, skip=0, tokens=200, **settings) -> list[Batch]:
    loader = BatchLoader(split, batch_tokens=tokens, taps=("final",), **settings)
    return list(loader.epoch(epoch, skip=skip))


def order(found: list[Batch]) -> list[tuple[int, ...]]:
    return [batch.sequences for batch in found]


def by_sequence(split) -> dict[int, tuple[np.ndarray, np.ndarray, torch.Tensor, int]]:
    """Ids, loss mask, embeddings and document of every readable sequence, straight from blocks."""
    found = {}
    for number in range(split.manifest.blocks):
        block = split.block(number, ("final",))
        for sequence, (a, b), document in zip(
            block.sequence_S, block.rows_S2, block.document_S, strict=True
        ):
            found[int(sequence)] = (
                block.ids_N[a:b],
                block.loss_mask_N[a:b],
                block.x_NH["final"][a:b],
                int(document),
            )
    return found


def same(first: Batch, second: Batch) -> bool:
    tensors = ("ids_BT", "positions_BT", "segments_BT", "predict_N", "targets_N")
    return (
        first.sequences == second.sequences
        and first.tokens == second.tokens
        and all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and np.array_equal(first.documents_N, second.documents_N)
        and np.array_equal(first.source_N2, second.source_N2)
        and all(torch.equal(first.x_BTH[tap], second.x_BTH[tap]) for tap in first.x_BTH)
    )


def test_order_is_a_function_of_seed_and_epoch(split):
    first = order(batches(split, 3, seed=7))
    np.random.seed(1)
    torch.manual_seed(1)
    assert order(batches(split, 3, seed=7)) == first
    assert order(batches(split, 4, seed=7)) != first
    assert order(batches(split, 3, seed=8)) != first


def test_without_shuffle_order_is_the_cache_s(split):
    flat = [s for batch in batches(split, shuffle=False) for s in batch.sequences]
    assert flat == sorted(flat)


def test_the_number_of_threads_changes_nothing(split, monkeypatch):
    first = batches(split)
    packed = set()

    def noted(*given, **more):
        packed.add(threading.current_thread())
        return pack(*given, **more)

    monkeypatch.setattr(loader_module, "pack", noted)
    for readers, packers in ((1, 0), (4, 1), (2, 3)):
        monkeypatch.setattr("os.cpu_count", lambda readers=readers: readers)
        monkeypatch.setattr(loader_module, "PACKING_THREADS", {"cpu": packers})
        packed.clear()
        assert all(same(a, b) for a, b in zip(first, batches(split), strict=True))
        assert (threading.main_thread() in packed) == (not packers)


@pytest.mark.parametrize("tokens", [1, 60, 200, 100_000])
def test_the_order_is_that_of_a_plain_implementation(split, monkeypatch, tokens):
    """Shuffle blocks, shuffle the sequences of each window, fill batches one after the other.

    A batch takes the first sequence that fits, again and again, until it has skipped three.
    """
    monkeypatch.setattr(order_module, "LOOK_AHEAD", 2)
    draw = np.random.default_rng([5, 3])
    blocks = draw.permutation(split.manifest.blocks).tolist()
    expected, left = [], []
    for start in range(0, len(blocks), order_module.WINDOW):
        items = [
            (int(sequence), int(b - a))
            for block in blocks[start : start + order_module.WINDOW]
            for sequence, (a, b) in zip(*split.sequences(block)[:2], strict=True)
        ]
        left += [items[index] for index in draw.permutation(len(items)).tolist()]
        while left:
            batch, used, missed = [], 0, 0
            for item in list(left):
                if used + item[1] <= tokens or not (batch or missed):
                    batch.append(item)
                    used += item[1]
                    left.remove(item)
                else:
                    missed += 1
                if missed == 3:
                    break
            expected.append(batch)
        left = expected.pop()
    expected.append(left)
    found = order(batches(split, 3, tokens=tokens, seed=5))
    assert found == [tuple(sequence for sequence, _ in batch) for batch in expected]


def test_skip_drops_the_first_batches(split):
    whole = batches(split, 2)
    for skip in (0, 1, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 3):
        rest = batches(split, 2, skip=skip)
        assert len(rest) == len(whole[skip:])
        assert all(same(a, b) for a, b in zip(rest, whole[skip:], strict=True))


@pytest.mark.parametrize("tokens", [1, 60, 200, 100_000])
def test_an_epoch_holds_every_sequence_once_within_the_budget(split, tokens):
    found = batches(split, 1, tokens=tokens)
    numbers = sorted(s for batch in found for s in batch.sequences)
    assert numbers == sorted(by_sequence(split))
    assert all(batch.tokens <= tokens or len(batch.sequences) == 1 for batch in found)
    assert sum(batch.tokens for batch in found) == split.manifest.tokens


def test_batches_are_full_across_windows(split):
    """Only the last batch of an epoch is short: a window does not end with a short one."""
    found, lengths = batches(split, 1), {s: len(held[0]) for s, held in by_sequence(split).items()}
    for batch, following in itertools.pairwise(found):
        assert batch.tokens + lengths[following.sequences[0]] > 200


def test_contents_and_targets_match_each_sequence(split):
    expected = by_sequence(split)
    for batch in batches(split, 1):
        T = batch.ids_BT.shape[1]
        real = batch.segments_BT >= 0
        assert int(real.sum()) == batch.tokens
        assert not batch.x_BTH["final"][~real].any()
        targets = {}
        for flat, target, document, place in zip(
            batch.predict_N.tolist(),
            batch.targets_N.tolist(),
            batch.documents_N.tolist(),
            batch.source_N2.tolist(),
            strict=True,
        ):
            b, t = divmod(flat, T)
            key = (int(batch.segments_BT[b, t]), int(batch.positions_BT[b, t]))
            assert place == [batch.sequences[key[0]], key[1]]
            assert key not in targets
            targets[key] = (target, document)
        for segment, sequence in enumerate(batch.sequences):
            ids, mask, x, document = expected[sequence]
            mine = batch.segments_BT == segment
            assert torch.equal(batch.ids_BT[mine], torch.from_numpy(ids))
            assert torch.equal(batch.positions_BT[mine], torch.arange(len(ids)))
            assert torch.equal(batch.x_BTH["final"][mine], x)
            predicted = {
                (segment, t - 1): (int(ids[t]), document) for t in range(1, len(ids)) if mask[t]
            }
            assert {k: v for k, v in targets.items() if k[0] == segment} == predicted


@pytest.mark.parametrize(("tokens", "few"), [(1, True), (200, True), (5_000, False)])
def test_cu_seqlens_are_padded_to_few_sizes(split, tokens, few):
    """To a power of two, or from 64 on to a multiple of 64."""
    for batch in batches(split, tokens=tokens, one_row=True):
        starts = batch.cu_seqlens_M.tolist()
        needed, T = sum(start < batch.ids_BT.shape[1] for start in starts) + 1, starts[-1]
        assert starts == sorted(starts) and batch.ids_BT.shape[1] == T
        assert len(batch.sequences) < needed <= len(starts)
        if few:
            assert len(starts) in (2, 4, 8, 16) and len(starts) < 2 * (needed + 1)
        else:
            assert len(starts) % 64 == 0 and len(starts) < needed + 1 + 64


@pytest.mark.parametrize("one_row", [False, True])
def test_the_first_token_of_a_sequence_is_never_a_target(split, monkeypatch, one_row):
    read = type(split).stored

    def all_targets(self, number, *more):
        block = read(self, number, *more)
        return dataclasses.replace(block, loss_mask_N=np.ones_like(block.loss_mask_N))

    monkeypatch.setattr(type(split), "stored", all_targets)
    for batch in batches(split, one_row=one_row):
        predicted = batch.segments_BT >= 0
        predicted &= batch.segments_BT == batch.segments_BT.roll(-1, 1)
        predicted &= batch.positions_BT + 1 == batch.positions_BT.roll(-1, 1)
        assert sorted(batch.predict_N.tolist()) == predicted.flatten().nonzero()[:, 0].tolist()
        assert torch.equal(batch.targets_N, batch.ids_BT.flatten()[batch.predict_N + 1])
        assert batch.total == (batch.tokens, batch.tokens - len(batch.sequences))


def test_the_branch_sees_each_sequence_alone(split):
    torch.manual_seed(0)
    model = Branch(BranchConfig(width=32), 32)
    torch.nn.init.normal_(model.branch.weight)
    expected = by_sequence(split)
    shared = 0
    with torch.no_grad():
        for batch in batches(split, 1, tokens=400):
            delta = change(
                model,
                {"final": batch.x_BTH["final"].float()},
                positions_BT=batch.positions_BT,
                attention=segment_mask(batch.segments_BT),
            )
            shared += len(batch.sequences) - len(batch.ids_BT)
            for segment, sequence in enumerate(batch.sequences):
                x = expected[sequence][2].float()[None]
                alone = change(model, {"final": x}, positions_BT=torch.arange(x.shape[1])[None])
                torch.testing.assert_close(
                    delta[batch.segments_BT == segment], alone[0], rtol=1e-4, atol=1e-5
                )
    # Some rows did hold two sequences; a window of one block has too few for that.
    assert shared > 0 or order_module.WINDOW == 1


def test_rows_hold_whole_sequences_without_overlap():
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = draw.integers(1, 60, size=draw.integers(1, 20)).tolist()
        rows = pack_rows(lengths, max(lengths))
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= max(lengths)


@pytest.mark.parametrize(("epochs", "room", "kept"), [(3, 0, 0), (3, 3, 3), (1, 3, 0)])
def test_at_most_the_blocks_of_two_windows_and_those_kept_are_in_memory(
    split, epochs, room, kept, monkeypatch
):
    class Held(StoredBlock):
        """A block that a weak reference can point to, equal to itself alone."""

        __hash__, __eq__ = object.__hash__, object.__eq__

    alive, most = weakref.WeakSet(), 0
    read = type(split).stored

    def held(self, number, *more):
        nonlocal most
        stored = read(self, number, *more)
        block = Held(*(getattr(stored, name.name) for name in dataclasses.fields(stored)))
        alive.add(block)
        most = max(most, len(alive))
        return block

    monkeypatch.setattr(type(split), "stored", held)
    kept_bytes = room * split.block_bytes(("final",))
    loader = BatchLoader(split, batch_tokens=30, taps=("final",), kept_bytes=kept_bytes)
    for _ in loader.epochs(range(epochs)):
        pass
    # Also, the first batch of a window may hold a sequence of the window before.
    assert 0 < most <= 2 * (order_module.WINDOW + 1) + kept
    assert split.manifest.blocks == 10


def test_an_error_of_a_reading_thread_is_raised_by_the_loader(split, monkeypatch):
    read = type(split).stored

    def broken(self, number, *more):
        if number == 3:
            raise OSError("the disk is gone")
        return read(self, number, *more)

    monkeypatch.setattr(type(split), "stored", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        batches(split)


@pytest.mark.parametrize("packers", [0, 2])
def test_closing_early_stops_every_thread(split, packers, monkeypatch):
    monkeypatch.setattr(loader_module, "PACKING_THREADS", {"cpu": packers})
    before = set(threading.enumerate())
    found = BatchLoader(split, batch_tokens=64, taps=("final",)).epoch(0)
    next(found)
    started = time.perf_counter()
    found.close()
    while set(threading.enumerate()) - before and time.perf_counter() - started < 5:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_prefetch_raises_in_the_place_of_the_item():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    found = prefetch(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(found)


def test_prefetch_does_not_keep_yielded_items():
    gone = []

    def items():
        for _ in range(4):
            made = [Mock()]
            kept = weakref.ref(made[0])
            yield made.pop()
            stop = time.perf_counter() + 2
            while kept() is not None and time.perf_counter() < stop:
                time.sleep(0.001)
            gone.append(kept() is None)  # before the next one is made

    found = prefetch(items(), 1)
    for _ in range(3):
        next(found)
    found.close()
    assert len(gone) >= 2 and all(gone)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_is_at_most_depth_items_ahead(depth):
    begun = []

    def items():
        for number in range(20):
            begun.append(number)
            yield number

    found = prefetch(items(), depth)
    for taken in range(1, 4):
        next(found)
        started = time.perf_counter()
        while len(begun) < taken + depth and time.perf_counter() - started < 5:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(begun) == taken + depth
    found.close()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("ranks", "skip"), [(2, 0), (3, 4), (7, 1), (50, 0)])
def test_ranks_in_turn_yield_the_batches_of_one_rank(split, ranks, skip, shuffle):
    alone = batches(split, 2, skip, shuffle=shuffle)
    shares = [
        batches(split, 2, skip, shuffle=shuffle, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    left = len(alone) % ranks
    rounds, rest = len(alone) // ranks, 0 if shuffle else left
    assert [len(share) for share in shares] == [rounds + (rank < rest) for rank in range(ranks)]
    in_turn = [b for turn in itertools.zip_longest(*shares) for b in turn if b is not None]
    assert len(in_turn) == len(alone) - (left if shuffle else 0)
    assert all(same(a, b) for a, b in zip(in_turn, alone, strict=False))


def test_an_epoch_goes_on_with_another_number_of_ranks(split):
    """Two steps of three ranks, then as many as two ranks have of the rest."""
    alone = order(batches(split, 5))
    first = [order(batches(split, 5, rank=rank, ranks=3))[:2] for rank in range(3)]
    then = [order(batches(split, 5, 6, rank=rank, ranks=2)) for rank in range(2)]
    seen = [batch for turn in zip(*first, strict=True) for batch in turn]
    seen += [batch for turn in zip(*then, strict=True) for batch in turn]
    assert seen == alone[: len(seen)]
    assert len(seen) == 6 + (len(alone) - 6) // 2 * 2


def test_a_rank_reads_only_the_blocks_of_its_batches(split, monkeypatch):
    read: list[int] = []
    stored = type(split).stored
    monkeypatch.setattr(
        type(split), "stored", lambda self, *given: read.append(given[0]) or stored(self, *given)
    )
    for rank in range(4):
        read.clear()
        found = batches(split, rank=rank, ranks=4)
        blocks = {
            number
            for number in range(split.manifest.blocks)
            for sequence in split.sequences(number)[0].tolist()
            if any(sequence in batch.sequences for batch in found)
        }
        assert set(read) == blocks
        assert len(blocks) < split.manifest.blocks or order_module.WINDOW > 1


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_ranks_is_refused(split, rank, ranks):
    with pytest.raises(UsageError, match=rf"found {rank}\."):
        batches(split, rank=rank, ranks=ranks)
