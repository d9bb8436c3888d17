"""Training batches in a deterministic order.

The order is a pure function of (seed, epoch, position): blocks are shuffled, then the sequences
inside a window of blocks; batches are filled to a token budget. Blocks are read and decoded on
threads, ahead of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.cache.reader import Block, SplitReader

Array = np.ndarray[Any, Any]

WINDOW = 8
"""Blocks whose sequences are shuffled together."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed into rows; a row holds one or more whole sequences, then padding.

    ``x_BTH``: by tap, bfloat16. ``ids_BT``, ``positions_BT`` (from 0 in each sequence),
    ``segments_BT`` (-1 on padding; attention never crosses a segment). ``targets_BT``: the token
    that each position is to predict, -1 where there is none. ``documents_BT``: the document, -1
    on padding. ``sequences``: numbers of the sequences in the split.
    """

    x_BTH: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    targets_BT: torch.Tensor
    documents_BT: torch.Tensor
    sequences: tuple[int, ...]
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        return Batch(
            {tap: x.to(device, non_blocking=True) for tap, x in self.x_BTH.items()},
            self.ids_BT.to(device, non_blocking=True),
            self.positions_BT.to(device, non_blocking=True),
            self.segments_BT.to(device, non_blocking=True),
            self.targets_BT.to(device, non_blocking=True),
            self.documents_BT.to(device, non_blocking=True),
            self.sequences,
            self.tokens,
        )


@dataclass(frozen=True, slots=True)
class _Item:
    """One sequence of a window: its block in the window, place in the block, and length."""

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
        threads: int = 2,
    ):
        self._split = split
        self._batch_tokens = batch_tokens
        self._taps = taps
        self._seed = seed
        self._shuffle = shuffle
        self._threads = threads

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch number ``skip`` on.

        Skipped batches are never read: only their lengths are.
        """
        generator = np.random.default_rng([self._seed, epoch])
        count = self._split.manifest.blocks
        blocks = generator.permutation(count) if self._shuffle else np.arange(count)
        windows = [blocks[i : i + WINDOW].tolist() for i in range(0, count, WINDOW)]
        with ThreadPoolExecutor(self._threads) as pool:
            pending: list[tuple[list[int], list[list[_Item]], list[Future[Block]] | None]] = []
            for window in windows:
                batches = self._plan(window, generator)
                dropped = min(skip, len(batches))
                skip -= dropped
                batches = batches[dropped:]
                futures = (
                    [pool.submit(self._split.block, block, self._taps) for block in window]
                    if batches
                    else None
                )
                pending.append((window, batches, futures))
                if len(pending) > 1:  # the next window is read while this one is trained on
                    yield from self._collate(*pending.pop(0))
            for entry in pending:
                yield from self._collate(*entry)

    def _plan(self, window: list[int], generator: np.random.Generator) -> list[list[_Item]]:
        items = [
            _Item(i, place, int(rows[1] - rows[0]))
            for i, block in enumerate(window)
            for place, rows in enumerate(self._split.sequences(block)[1])
        ]
        order = generator.permutation(len(items)) if self._shuffle else np.arange(len(items))
        batches: list[list[_Item]] = []
        used = self._batch_tokens + 1
        for index in order:
            item = items[index]
            if used + item.length > self._batch_tokens:
                batches.append([])
                used = 0
            batches[-1].append(item)
            used += item.length
        return batches

    def _collate(
        self, window: list[int], batches: list[list[_Item]], futures: list[Future[Block]] | None
    ) -> Iterator[Batch]:
        if futures is None:
            return
        blocks = [future.result() for future in futures]
        for batch in batches:
            yield collate([(blocks[item.block], item.place) for item in batch], self._taps)


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


def collate(items: list[tuple[Block, int]], taps: tuple[str, ...]) -> Batch:
    """Pack (block, place in the block) items into a `Batch`."""
    lengths = [int(block.rows_S2[i, 1] - block.rows_S2[i, 0]) for block, i in items]
    rows = pack_rows(lengths)
    shape = (len(rows), max(lengths))
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, targets, documents = (np.full(shape, -1, np.int64) for _ in range(3))
    x_BTH = {
        tap: torch.zeros(*shape, items[0][0].x_NH[tap].shape[1], dtype=torch.bfloat16)
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
            documents[b, start:stop] = block.document_S[i]
            wanted = block.ids_N[first + 1 : last].copy()
            wanted[~block.loss_mask_N[first + 1 : last]] = -1
            targets[b, start : stop - 1] = wanted
            for tap in taps:
                x_BTH[tap][b, start:stop] = block.x_NH[tap][first:last]
            start = stop
    return Batch(
        x_BTH,
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        torch.from_numpy(targets),
        torch.from_numpy(documents),
        tuple(int(block.sequence_S[i]) for block, i in items),
        sum(lengths),
    )
