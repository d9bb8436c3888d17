"""Training batches in a deterministic order.

The order is a pure function of (seed, epoch, position): blocks are shuffled, then the sequences
inside a window of blocks; batches are filled to a token budget. Blocks are read and decoded on
threads, ahead of the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from embedcache.cache.prefetch import prefetch
from embedcache.cache.reader import Block, SplitReader

Array = np.ndarray[Any, Any]

WINDOW = 8
"""Blocks whose sequences are shuffled together."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed into rows; a row holds one or more whole sequences, then padding.

    ``x_BTH``: by tap, bfloat16. ``ids_BT``, ``positions_BT`` (from 0 in each sequence),
    ``segments_BT`` (-1 on padding; attention never crosses a segment). ``wanted_N``: the flat
    positions, in [0, B*T), whose next token is a target; ``targets_N``: those tokens;
    ``documents_N``: the documents they are of. ``sequences``: numbers of the sequences in the
    split. ``tokens``: tokens, padding left out.
    """

    x_BTH: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    wanted_N: torch.Tensor
    targets_N: torch.Tensor
    documents_N: torch.Tensor
    sequences: tuple[int, ...]
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; copies from pinned memory do not wait."""

        def change(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, non_blocking=True)

        names = ("ids_BT", "positions_BT", "segments_BT", "wanted_N", "targets_N", "documents_N")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, x_BTH={tap: change(x) for tap, x in self.x_BTH.items()}, **changed)

    def at_wanted(self, value_BTH: torch.Tensor) -> torch.Tensor:
        """Return the rows [N, H] of a [B, T, H] tensor whose next token is a target."""
        return value_BTH.flatten(0, 1).index_select(0, self.wanted_N)


@dataclass(frozen=True, slots=True)
class _Item:
    """One sequence: its block, place in the block, and length."""

    block: int
    place: int
    length: int


class BatchLoader:
    """Iterates over one split in batches of at most ``batch_tokens`` tokens."""

    def __init__(
        self,
        split: SplitReader,
        *,
        batch_tokens: int,
        taps: tuple[str, ...],
        seed: int = 0,
        shuffle: bool = True,
        pin: bool = False,
    ):
        self._split = split
        self._batch_tokens = batch_tokens
        self._taps = taps
        self._seed = seed
        self._shuffle = shuffle
        self._pin = pin
        self._threads = min(8, os.cpu_count() or 1)

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch number ``skip`` on.

        Skipped batches are never read: only their lengths are. Batches are made on a thread.
        """
        return prefetch(self._batches(epoch, skip))

    def _batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._threads) as pool:
            futures: dict[int, Future[Block]] = {}
            ahead: list[tuple[list[list[_Item]], dict[int, Future[Block]]]] = []
            for batches in self._plan(epoch):
                dropped = min(skip, len(batches))
                skip -= dropped
                batches = batches[dropped:]
                blocks = dict.fromkeys(item.block for batch in batches for item in batch)
                futures = {
                    block: futures.get(block) or pool.submit(self._split.block, block, self._taps)
                    for block in blocks
                }
                ahead.append((batches, futures))
                if len(ahead) > 1:  # the next window is read while this one is trained on
                    yield from self._collate(*ahead.pop(0))
            for window in ahead:
                yield from self._collate(*window)

    def _plan(self, epoch: int) -> Iterator[list[list[_Item]]]:
        """Yield the batches of each window; what does not fill its last one goes to the next."""
        generator = np.random.default_rng([self._seed, epoch])
        count = self._split.manifest.blocks
        blocks = generator.permutation(count) if self._shuffle else np.arange(count)
        batch: list[_Item] = []
        used = 0
        for start in range(0, count, WINDOW):
            items = [
                _Item(block, place, int(rows[1] - rows[0]))
                for block in blocks[start : start + WINDOW].tolist()
                for place, rows in enumerate(self._split.sequences(block)[1])
            ]
            order = generator.permutation(len(items)) if self._shuffle else np.arange(len(items))
            full: list[list[_Item]] = []
            for item in (items[index] for index in order):
                if batch and used + item.length > self._batch_tokens:
                    full.append(batch)
                    batch, used = [], 0
                batch.append(item)
                used += item.length
            yield full
        yield [batch] if batch else []

    def _collate(
        self, batches: list[list[_Item]], futures: dict[int, Future[Block]]
    ) -> Iterator[Batch]:
        for items in batches:
            places = [(futures[item.block].result(), item.place) for item in items]
            yield collate(places, self._taps, pin=self._pin)


def pack_rows(lengths: list[int]) -> list[list[int]]:
    """Pack sequences into rows no longer than the longest one (first fit, longest first).

    >>> pack_rows([5, 3, 2, 4])
    [[0], [3], [1, 2]]
    """
    width = max(lengths)
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, space in enumerate(free) if space >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(width)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def collate(items: list[tuple[Block, int]], taps: tuple[str, ...], *, pin: bool = False) -> Batch:
    """Pack (block, place in the block) items into a `Batch`, in pinned memory where asked."""
    lengths = [int(block.rows_S2[i, 1] - block.rows_S2[i, 0]) for block, i in items]
    rows = pack_rows(lengths)
    shape = (len(rows), max(lengths))
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    wanted: list[Array] = []
    targets: list[Array] = []
    documents: list[Array] = []
    x_BTH = {
        tap: torch.empty(
            *shape, items[0][0].x_NH[tap].shape[1], dtype=torch.bfloat16, pin_memory=pin
        )
        for tap in taps
    }
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            block, i = items[index]
            first, last = (int(v) for v in block.rows_S2[i])
            stop = start + lengths[index]
            ids[b, start:stop] = block.ids_N[first:last]
            positions[b, start:stop] = np.arange(lengths[index])
            segments[b, start:stop] = index
            for tap in taps:
                x_BTH[tap][b, start:stop] = block.x_NH[tap][first:last]
            places = np.flatnonzero(block.loss_mask_N[first + 1 : last])
            wanted.append(b * shape[1] + start + places)
            targets.append(block.ids_N[first + 1 : last][places])
            documents.append(np.full(len(places), block.document_S[i]))
            start = stop
        for tap in taps:
            x_BTH[tap][b, start:] = 0

    def tensor(values: Array) -> torch.Tensor:
        return torch.from_numpy(values).pin_memory() if pin else torch.from_numpy(values)

    return Batch(
        x_BTH,
        tensor(ids),
        tensor(positions),
        tensor(segments),
        tensor(np.concatenate(wanted)),
        tensor(np.concatenate(targets)),
        tensor(np.concatenate(documents)),
        tuple(int(block.sequence_S[i]) for block, i in items),
        sum(lengths),
    )
