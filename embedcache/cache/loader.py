"""Training batches in a deterministic order (see `embedcache.cache.order`).

Blocks are read and decoded on threads, ahead of the trainer: those of two windows are in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from embedcache.cache.batch import Batch, Counts, Drawn
from embedcache.cache.order import BatchOrder
from embedcache.cache.packing import Packed, counted, cut_parts, length, pack
from embedcache.cache.prefetch import prefetch
from embedcache.cache.reader import SplitReader, StoredBlock
from embedcache.cache.subset import Subset

Array = np.ndarray[Any, Any]


PACKERS = {"cuda": 2}
"""Threads that pack batches, by device: one does not keep up with a GPU. Else the caller does."""


class Cut(NamedTuple):
    """What goes into a batch, or a part of one: (block, place in the block) items; see `Batch`."""

    items: list[tuple[StoredBlock, int]]
    whole: Counts
    last: bool


class Part(NamedTuple):
    """A batch, or a part of one, on the host; see `Batch` of ``whole`` and ``last``."""

    packed: Packed
    whole: Counts
    last: bool


class BatchLoader:
    """Iterates over one split, or a subset of it, in batches of at most ``batch_tokens`` tokens.

    With ``ranks``, one loader for each ``rank`` of a data-parallel trainer: batch by batch in turn,
    they yield the very batches of a single one. Each reads the blocks that its own batches need.
    Where the order is shuffled, for training, all ranks have the same number of batches, so that
    none waits for another's gradient: up to ``ranks`` - 1 at the end of an epoch are left out (the
    next epoch's are others). Without shuffling, for scoring, nothing is left out, and ranks may
    differ by one.

    ``one_row`` puts a batch's sequences one behind the other, in a row of fixed length.
    ``part_tokens`` cuts batches into parts of at most so many tokens, of whole sequences.
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
        one_row: bool = False,
        part_tokens: int | None = None,
        ahead: int = 2,
    ):
        """Open it; ``ahead`` batches, or parts, are made before they are asked for."""
        self._split = split
        self._part_tokens = part_tokens or batch_tokens
        self._row_tokens = self._part_tokens if one_row else None
        self._ahead = ahead
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

    def epoch(
        self, epoch: int, *, skip: int = 0, draw: Callable[[Batch], Drawn] | None = None
    ) -> Generator[Batch]:
        """Yield this rank's batches of an epoch, from its batch number ``skip`` on.

        ``skip`` counts the batches of all ranks together, so a run goes on with another number of
        them. Skipped batches are never read: only their lengths are. On CUDA batches are packed on
        threads, and on another copied and decoded, on a stream of their own. ``draw`` is called
        there with each; what it returns comes along as ``drawn``.
        """
        parts = self._packed(self._cut(epoch, skip), PACKERS.get(self._device.type, 0))
        draw = draw or _nothing
        if self._device.type != "cuda":
            # Not on a thread: torch's products on the caller's threads slow down by a third once
            # another thread has begun a team of its own. Blocks are read ahead in any case.
            yield from self._made(parts, draw)
            return
        stream = _stream(self._device)
        # What shortlists are drawn by is made on the caller's.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        made = _on_stream(self._made(parts, draw), stream)
        with closing(prefetch(made, self._ahead)) as batches:
            for batch, copied in batches:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(copied)
                for tensor in batch.tensors():
                    tensor.record_stream(here)
                yield batch

    def _made(self, parts: Iterable[Part], draw: Callable[[Batch], Drawn]) -> Iterator[Batch]:
        for part in parts:
            batch = self._decoded(part)
            yield replace(batch, drawn=draw(batch))

    def _packed(self, cuts: Iterable[Cut], packers: int) -> Iterator[Part]:
        """Pack the cuts in order, by the caller, or ahead of it by so many threads."""
        if not packers:
            yield from map(self._pack, cuts)
            return
        with ThreadPoolExecutor(packers) as pool:
            coming: deque[Future[Part]] = deque()
            for cut in cuts:
                coming.append(pool.submit(self._pack, cut))
                if len(coming) > packers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _pack(self, cut: Cut) -> Part:
        packed = pack(
            cut.items, self._taps, self._split.specs, self._device, row_tokens=self._row_tokens
        )
        return Part(packed, cut.whole, cut.last)

    def _cut(self, epoch: int, skip: int) -> Iterator[Cut]:
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
    ) -> Iterator[Cut]:
        for items in batches:
            places = [(futures[block].result(), place) for block, place, _ in items.tolist()]
            whole = counted(places)
            parts = cut_parts([length(*place) for place in places], self._part_tokens)
            for part in parts:
                yield Cut([places[index] for index in part], whole, part is parts[-1])

    def _decoded(self, part: Part) -> Batch:
        """Copy a part to the device and decode its embeddings there."""
        packed = part.packed

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
            None if packed.starts_M is None else moved(packed.starts_M),
            part.whole,
            part.last,
        )


def _nothing(batch: Batch) -> Drawn:
    return ()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that batches for a device are made on: libraries keep memory for each."""
    return torch.cuda.Stream(device)


def _on_stream(
    made: Iterator[Batch], stream: torch.cuda.Stream
) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    while True:
        with torch.cuda.stream(stream):  # not across a yield: it may be closed by another thread
            batch = next(made, None)
            if batch is None:
                return
            copied = torch.cuda.Event()
            copied.record()
        yield batch, copied
