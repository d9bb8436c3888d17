"""Training batches in a deterministic order (see `embedcache.cache.order`).

Blocks are read and decoded on threads, ahead of the trainer: those of two windows are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.cache.codecs import ArraySpec
from embedcache.cache.order import BatchOrder
from embedcache.cache.prefetch import prefetch
from embedcache.cache.reader import SplitReader, StoredBlock
from embedcache.cache.subset import Subset

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed into rows; a row holds one or more whole sequences, then padding.

    On the loader's device: ``x_BTH``, bfloat16 by tap, zero on padding; ``ids_BT``;
    ``positions_BT`` (from 0 in each sequence); ``segments_BT`` (-1 on padding; attention never
    crosses a segment); ``wanted_N``, the flat positions, in [0, B*T), whose next token is a target;
    ``targets_N``, those tokens. On the host, of the same N: ``documents_N`` and ``places_N2``, the
    wanted position's sequence in the split and position in it. ``sequences``: numbers of the
    sequences in the split. ``tokens``: tokens, padding left out. ``packed``: whether any row holds
    more than one sequence; else plain causal attention crosses none.
    """

    x_BTH: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    wanted_N: torch.Tensor
    targets_N: torch.Tensor
    documents_N: Array
    places_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool

    def tensors(self) -> list[torch.Tensor]:
        """Return all that lies on the device."""
        names = ("ids_BT", "positions_BT", "segments_BT", "wanted_N", "targets_N")
        return [*self.x_BTH.values(), *(getattr(self, name) for name in names)]

    def at_wanted(self, value_BTH: torch.Tensor) -> torch.Tensor:
        """Return the rows [N, H] of a [B, T, H] tensor whose next token is a target."""
        return value_BTH.flatten(0, 1).index_select(0, self.wanted_N)


class BatchLoader:
    """Iterates over one split, or a subset of it, in batches of at most ``batch_tokens`` tokens.

    With ``ranks``, one loader for each ``rank`` of a data-parallel trainer: batch by batch in turn,
    they yield the very batches of a single one. Each reads the blocks that its own batches need.
    Where the order is shuffled, for training, all ranks have the same number of batches, so that
    none waits for another's gradient: up to ``ranks`` - 1 at the end of an epoch are left out (the
    next epoch's are others). Without shuffling, for scoring, nothing is left out, and ranks may
    differ by one.
    """

    def __init__(
        self,
        split: SplitReader,
        *,
        batch_tokens: int,
        taps: tuple[str, ...],
        seed: int = 0,
        shuffle: bool = True,
        device: torch.device | None = None,
        subset: Subset | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        self._split = split
        self._order = BatchOrder(
            split,
            batch_tokens=batch_tokens,
            seed=seed,
            shuffle=shuffle,
            subset=subset,
            rank=rank,
            ranks=ranks,
        )
        self._taps = taps
        self._device = device or torch.device("cpu")
        self._threads = min(8, os.cpu_count() or 1)

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch, from its batch number ``skip`` on.

        ``skip`` counts the batches of all ranks together, so a run goes on with another number of
        them. Skipped batches are never read: only their lengths are. Batches are made on a thread;
        on CUDA they are copied and decoded there on a stream of their own.
        """
        if self._device.type != "cuda":
            yield from prefetch(self._batches(epoch, skip))
            return
        with closing(prefetch(self._on_stream(epoch, skip))) as batches:
            for batch, copied in batches:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(copied)
                for tensor in batch.tensors():
                    tensor.record_stream(stream)
                yield batch

    def _on_stream(self, epoch: int, skip: int) -> Iterator[tuple[Batch, torch.cuda.Event]]:
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            for batch in self._batches(epoch, skip):
                copied = torch.cuda.Event()
                copied.record()
                yield batch, copied

    def _batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._threads) as pool:
            futures: dict[int, Future[StoredBlock]] = {}
            ahead: list[tuple[list[Array], dict[int, Future[StoredBlock]]]] = []
            for batches in self._order.windows(epoch, skip):
                blocks = dict.fromkeys(block for items in batches for block in items[:, 0].tolist())
                futures = {
                    block: futures.get(block) or pool.submit(self._split.stored, block, self._taps)
                    for block in blocks
                }
                ahead.append((batches, futures))
                if len(ahead) > 1:  # the next window is read while this one is trained on
                    yield from self._collate(*ahead.pop(0))
            for window in ahead:
                yield from self._collate(*window)

    def _collate(
        self, batches: list[Array], futures: dict[int, Future[StoredBlock]]
    ) -> Iterator[Batch]:
        for items in batches:
            places = [(futures[block].result(), place) for block, place, _ in items.tolist()]
            yield self._decoded(pack(places, self._taps, self._split.specs, self._device))

    def _decoded(self, packed: Packed) -> Batch:
        """Copy a batch to the device and decode its embeddings there."""

        def moved(values: Array) -> torch.Tensor:
            value = torch.from_numpy(values)
            if self._device.type == "cuda":
                value = value.pin_memory()
            return value.to(self._device, non_blocking=True)

        segments_BT = moved(packed.segments_BT)
        x_BTH = {}
        for tap, arrays in packed.arrays.items():
            stored = {name: a.to(self._device, non_blocking=True) for name, a in arrays.items()}
            x = self._split.codecs[tap].decode(stored, packed.ids_BT)
            x_BTH[tap] = x.masked_fill_((segments_BT < 0)[..., None], 0)
        return Batch(
            x_BTH,
            moved(packed.ids_BT),
            moved(packed.positions_BT),
            segments_BT,
            moved(packed.wanted_N),
            moved(packed.targets_N),
            packed.documents_N,
            packed.places_N2,
            packed.sequences,
            packed.tokens,
            packed.packed,
        )


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


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the host, its embeddings still integers, undefined on padding; see `Batch`."""

    arrays: dict[str, dict[str, torch.Tensor]]
    ids_BT: Array
    positions_BT: Array
    segments_BT: Array
    wanted_N: Array
    targets_N: Array
    documents_N: Array
    places_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool


def pack(
    items: list[tuple[StoredBlock, int]],
    taps: tuple[str, ...],
    specs: tuple[ArraySpec, ...],
    device: torch.device,
) -> Packed:
    """Pack (block, place in the block) items; the integers into pinned memory for CUDA."""
    spans = [(int(a), int(b)) for a, b in (block.rows_S2[i] for block, i in items)]
    lengths = [stop - first for first, stop in spans]
    rows = pack_rows(lengths)
    B, T = len(rows), max(lengths)
    ids, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    segments = np.full((B, T), -1, np.int64)
    arrays = {
        tap: {
            spec.group: torch.empty(
                (B, T, *items[0][0].arrays[tap][spec.group].shape[1:]),
                dtype=getattr(torch, spec.dtype),
                pin_memory=device.type == "cuda",
            )
            for spec in specs
        }
        for tap in taps
    }
    views = [(tap, group, a.numpy()) for tap in taps for group, a in arrays[tap].items()]
    wanted: list[Array] = []
    targets: list[Array] = []
    documents: list[Array] = []
    sources: list[Array] = []
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            (block, i), (first, last) = items[index], spans[index]
            stop = start + lengths[index]
            ids[b, start:stop] = block.ids_N[first:last]
            positions[b, start:stop] = np.arange(lengths[index])
            segments[b, start:stop] = index
            for tap, group, view in views:
                view[b, start:stop] = block.arrays[tap][group][first:last]
            places = np.flatnonzero(block.loss_mask_N[first + 1 : last])
            wanted.append(b * T + start + places)
            targets.append(block.ids_N[first + 1 : last][places])
            documents.append(np.full(len(places), block.document_S[i]))
            sources.append(np.stack([np.full(len(places), block.sequence_S[i]), places], axis=1))
            start = stop
    return Packed(
        arrays,
        ids,
        positions,
        segments,
        np.concatenate(wanted),
        np.concatenate(targets),
        np.concatenate(documents),
        np.concatenate(sources),
        tuple(int(block.sequence_S[i]) for block, i in items),
        sum(lengths),
        any(len(row) > 1 for row in rows),
    )
