"""Training batches in a deterministic order (see `embedcache.data.order`).

Blocks are read and decoded on threads, ahead of the trainer: those of two windows are in memory,
and from one epoch to the next those that there is room for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import chain, islice, starmap
from typing import Any

import numpy as np
import torch

from embedcache.cache.split_reader import SplitReader, StoredBlock
from embedcache.data.batch import Batch, Drawn
from embedcache.data.order import WINDOW, BatchOrder
from embedcache.data.packing import Cut, Packed, cut_batch, pack
from embedcache.data.prefetch import look_ahead, prefetch
from embedcache.data.subset import Subset
from embedcache.device import free_memory, recording

Array = np.ndarray[Any, Any]
Blocks = dict[int, Future[StoredBlock]]
Window = tuple[list[Array | None], Blocks]
"""The batches of a window, None where an epoch ends, and its blocks, of which reading has begun."""

PACKERS = {"cuda": 2}
"""Threads that pack batches, by device: one does not keep up with a GPU. Else the caller does."""

KEPT_BYTES = 1 << 30
"""Of blocks that a run keeps from one epoch to the next, at most, in all its loaders."""

PATIENCE, PAUSE_SECONDS = 5, 0.02
"""How often, and how long, making a part waits for the memory of the one that is being used."""


class BatchLoader:
    """Iterates over one split, or a subset of it, in batches of at most ``batch_tokens`` tokens.

    Over several epochs, the first blocks are kept, integers as they were read, as many as
    ``kept_bytes`` hold; see `room_to_keep`.

    With ``ranks``, one loader for each ``rank`` of a data-parallel trainer: batch by batch in turn,
    they yield the very batches of a single one. Each reads the blocks that its own batches need.
    Where the order is shuffled, for training, all ranks have the same number of batches, so that
    none waits for another's gradient: up to ``ranks`` - 1 at the end of an epoch are left out (the
    next epoch's are others). Without shuffling, for scoring, nothing is left out, and ranks may
    differ by one.

    ``one_row`` puts a batch's sequences one behind the other, in a row of fixed length.
    With ``top_ids``, those of wanted positions come along; the split must store them.
    ``part_tokens`` cuts batches into parts of at most so many tokens, of whole sequences, where the
    device's memory is short; what lies there then is of one epoch at a time.
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
        kept_bytes: int = 0,
        top_ids: bool = False,
    ):
        """Open it; ``ahead`` batches, or parts, are made before they are asked for."""
        self._split = split
        self._in_parts = part_tokens is not None
        self._part_tokens = part_tokens or batch_tokens
        self._row_tokens = self._part_tokens if one_row else None
        self._ahead = ahead
        self._kept_bytes = kept_bytes
        self._top_ids = top_ids
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

    def epoch(
        self, epoch: int, *, skip: int = 0, draw: Callable[[Batch], Drawn] | None = None
    ) -> Generator[Batch]:
        """Yield this rank's batches of one epoch; see `epochs`."""
        with closing(self.epochs(range(epoch, epoch + 1), skip=skip, draw=draw)) as batches:
            yield from filter(None, batches)

    def epochs(
        self, epochs: range, *, skip: int = 0, draw: Callable[[Batch], Drawn] | None = None
    ) -> Generator[Batch | None]:
        """Yield this rank's batches of some epochs, and None at the end of each.

        Reading begins at once. They are one stream: while an epoch's last batches are used, and
        until more are asked for after its end, the next one's first are read and made.

        It begins at the first epoch's batch number ``skip``, which counts those of all ranks
        together, so a run goes on with another number of them. Skipped batches are never read: only
        their lengths are. On CUDA batches are packed on threads, and on another copied and decoded,
        on a stream of their own. ``draw`` is called there with each; what it returns comes along as
        ``drawn``. An error is raised where its batch is due.
        """
        batches = self._stream(epochs, skip, draw or _nothing)
        next(batches)
        return batches

    def _stream(
        self, epochs: range, skip: int, draw: Callable[[Batch], Drawn]
    ) -> Generator[Batch | None]:
        """Yield None once reading has begun, then what `epochs` yields."""
        with _threads(min(WINDOW, os.cpu_count() or 1)) as readers:
            windows = self._windows(epochs, skip, readers)
            begun = iter([*islice(windows, 1)])  # the list would keep a window all the time
            yield None
            yield from self._batches(chain(begun, windows), len(epochs), draw)

    def _batches(
        self, windows: Iterator[Window], epochs: int, draw: Callable[[Batch], Drawn]
    ) -> Generator[Batch | None]:
        """Yield the batches of windows that are some epochs, as `epochs` does."""
        with self._packed(self._cut(windows)) as packed:
            if self._device.type != "cuda":
                # Not on a thread: torch's products on the caller's threads slow down by a third
                # once another thread has begun a team of its own. Blocks are read ahead in any
                # case.
                for part in packed:
                    yield None if part is None else self._made(part, draw)
                return
            # What shortlists are drawn by is made on the caller's stream.
            _stream(self._device).wait_stream(torch.cuda.current_stream(self._device))
            for run in self._runs(packed, epochs):
                with closing(prefetch(self._copied(run, draw), self._ahead)) as made:
                    yield from map(self._arrived, made)  # a name would keep a batch too long

    def _cut(self, windows: Iterator[Window]) -> Iterator[Cut | None]:
        """Cut the batches out of windows; the next one's blocks are read meanwhile."""
        return chain.from_iterable(starmap(self._cuts, look_ahead(windows, 1)))

    @contextmanager
    def _packed(self, cuts: Iterator[Cut | None]) -> Iterator[Iterator[Packed | None]]:
        """Pack the cuts in order, by the caller, or ahead of it by so many threads."""
        packers = PACKERS.get(self._device.type, 0)
        if not packers:
            yield map(self._pack, cuts)
            return
        with _threads(packers) as pool:
            jobs = (pool.submit(self._pack, cut) for cut in cuts)
            yield map(Future.result, look_ahead(jobs, packers))

    def _runs(
        self, packed: Iterator[Packed | None], epochs: int
    ) -> Iterator[Iterator[Packed | None]]:
        """Yield what is copied in one go: all, or, in parts, an epoch up to its end."""
        if not self._in_parts:
            yield packed
            return
        for _ in range(epochs):
            yield chain(iter(partial(next, packed), None), [None])

    def _windows(self, epochs: range, skip: int, readers: Executor) -> Iterator[Window]:
        """Yield the windows of some epochs."""
        blocks: Blocks = {}
        kept: Blocks = {}
        size = self._split.block_bytes(self._taps, top_ids=self._top_ids)
        most = self._kept_bytes // size if len(epochs) > 1 else 0
        for batches in self._order.windows(epochs, skip):
            numbers = [items[:, 0].tolist() for items in batches if items is not None]
            blocks = {
                block: blocks.get(block)
                or kept.get(block)
                or readers.submit(self._split.stored, block, self._taps, self._top_ids)
                for block in dict.fromkeys(chain(*numbers))
            }
            others = (item for item in blocks.items() if item[0] not in kept)
            kept |= islice(others, most - len(kept))
            yield batches, blocks

    def _cuts(self, batches: list[Array | None], blocks: Blocks) -> Iterator[Cut | None]:
        for items in batches:
            if items is None:
                yield None
            else:
                places = [(blocks[block].result(), place) for block, place, _ in items.tolist()]
                yield from cut_batch(places, self._part_tokens)

    def _pack(self, cut: Cut | None) -> Packed | None:
        if cut is None:
            return None
        return pack(cut, self._taps, self._split.specs, self._device, row_tokens=self._row_tokens)

    def _made(self, packed: Packed, draw: Callable[[Batch], Drawn]) -> Batch:
        batch = self._decoded(packed)
        return replace(batch, drawn=draw(batch))

    def _copied(
        self, packed: Iterable[Packed | None], draw: Callable[[Batch], Drawn]
    ) -> Iterator[tuple[Batch, torch.cuda.Event] | None]:
        """Make batches on a stream of their own, each with the event of when it is there."""
        for one in packed:
            yield None if one is None else self._copy(one, draw)

    def _copy(
        self, packed: Packed, draw: Callable[[Batch], Drawn]
    ) -> tuple[Batch, torch.cuda.Event]:
        """Make a batch; where memory is short, once the one before has gone."""
        for _ in range(PATIENCE if self._in_parts else 0):
            with suppress(torch.OutOfMemoryError):
                return self._copy_now(packed, draw)
            time.sleep(PAUSE_SECONDS)
        return self._copy_now(packed, draw)

    def _copy_now(
        self, packed: Packed, draw: Callable[[Batch], Drawn]
    ) -> tuple[Batch, torch.cuda.Event]:
        # Not across a yield: another thread may close it.
        with recording, torch.cuda.stream(_stream(self._device)):
            batch, copied = self._made(packed, draw), torch.cuda.Event()
            copied.record()
        return batch, copied

    def _arrived(self, made: tuple[Batch, torch.cuda.Event] | None) -> Batch | None:
        if made is None:
            return None
        batch, copied = made
        here = torch.cuda.current_stream(self._device)
        here.wait_event(copied)
        by_memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in batch.tensors()}
        for tensor in by_memory.values():
            tensor.record_stream(here)
        return batch

    def _decoded(self, packed: Packed) -> Batch:
        """Copy a batch, or a part of one, to the device and decode its embeddings there."""
        moved = partial(torch.Tensor.to, device=self._device, non_blocking=True)
        ids_BT, positions_BT, segments_BT = moved(packed.rows_3BT)
        predict_N, targets_N = moved(packed.predict_2N)
        full = packed.tokens == segments_BT.numel()
        padding_BT1 = None if full else (segments_BT < 0)[..., None]
        x_BTH = {}
        for tap, arrays in packed.arrays.items():
            stored = {name: moved(integers) for name, integers in arrays.items()}
            x = self._split.codecs[tap].decode(stored, packed.rows_3BT[0].numpy())
            x_BTH[tap] = x if padding_BT1 is None else x.masked_fill_(padding_BT1, 0)
        return Batch(
            x_BTH,
            ids_BT,
            positions_BT,
            segments_BT,
            predict_N,
            targets_N,
            packed.documents_N,
            packed.places_N2,
            packed.sequences,
            packed.tokens,
            packed.packed,
            None if packed.cu_seqlens_M is None else moved(packed.cu_seqlens_M),
            packed.whole,
            packed.last,
            top_ids_NK=None if packed.top_ids_NK is None else moved(packed.top_ids_NK),
        )


def room_to_keep(loaders: int) -> int:
    """Return the bytes of blocks that each of so many loaders of a run may keep.

    Together they keep `KEPT_BYTES`, and no more than an eighth of the memory that is free.
    """
    return min(KEPT_BYTES, free_memory(torch.device("cpu")) // 8) // loaders


def _nothing(batch: Batch) -> Drawn:
    return ()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that batches for a device are made on: libraries keep memory for each."""
    return torch.cuda.Stream(device)


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Have threads that end with the block; what they have not begun by then is left undone."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
