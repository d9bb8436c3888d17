"""Loads batches in a deterministic order; see `embedcache.data.order`.

Blocks are read and decompressed on threads, ahead of the trainer. At most the blocks of two windows
are in memory, plus the blocks that ``kept_bytes`` keeps from one epoch to the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain, islice, starmap
from typing import Any, overload

import numpy as np
import torch

from embedcache.cache.split_reader import SplitReader, StoredBlock
from embedcache.data.batch import Batch
from embedcache.data.order import WINDOW, BatchOrder
from embedcache.data.packing import BatchPart, Packed, pack, split_batch
from embedcache.data.prefetch import look_ahead
from embedcache.data.subset import Subset
from embedcache.data.to_device import Prepared, ToDevice
from embedcache.device import free_memory

Array = np.ndarray[Any, Any]
Blocks = dict[int, Future[StoredBlock]]
Window = tuple[list[Array | None], Blocks]
"""The batches of a window, None where an epoch ends, and its blocks, which are being read."""

PACKING_THREADS = {"cuda": 2}
"""Threads that pack batches, by device: one does not keep up with a GPU. On other devices the
calling thread packs."""

KEPT_BYTES = 1 << 30
"""Most bytes of blocks that all loaders of a run keep from one epoch to the next."""


class BatchLoader:
    """Iterates over one split, or a subset of it, in batches.

    With ``ranks``, each ``rank`` of a data-parallel trainer has its own loader. In turn, the
    loaders yield exactly the batches of a single loader, and each reads only the blocks that its
    own batches need. If the order is shuffled, for training, all ranks have the same number of
    batches: up to ``ranks`` - 1 batches at the end of an epoch are left out. If it is not, for
    scoring, nothing is left out, and the ranks' numbers of batches may differ by one.

    Args:
        split: the split to read.
        batch_tokens: most tokens of a batch; a longer sequence is a batch of its own.
        taps: taps whose embeddings are read.
        seed: seed of the order.
        shuffle: whether blocks, and the sequences in a window of blocks, are shuffled.
        device: where batches are put; by default the CPU.
        subset: the documents to read; by default all.
        rank: the number of this process, from 0.
        ranks: the number of processes.
        one_row: put the sequences of a batch one behind the other, in a row of fixed length.
        part_tokens: yield each batch in parts of whole sequences and of at most this many tokens,
            for a device with little memory. Batches of the next epoch are then not made ahead.
        ahead: number of batches, or parts, that are made on CUDA before they are asked for.
        kept_bytes: bytes of blocks, as stored, that are kept from one epoch to the next.
        top_ids: whether to read the base's top ids, which the split must store.
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

    def epoch(self, epoch: int, *, skip: int = 0) -> Generator[Batch]:
        """Yield this rank's batches of one epoch; see `epochs`."""
        with closing(self.epochs(range(epoch, epoch + 1), skip=skip)) as batches:
            yield from filter(None, batches)

    @overload
    def epochs(self, epochs: range, *, skip: int = 0) -> Generator[Batch | None]: ...
    @overload
    def epochs(
        self, epochs: range, *, skip: int = 0, prepare: Callable[[Batch], Prepared]
    ) -> Generator[Prepared | None]: ...
    def epochs(
        self, epochs: range, *, skip: int = 0, prepare: Callable[[Batch], Any] | None = None
    ) -> Generator[Any]:
        """Yield this rank's batches of several epochs, and None at the end of each epoch.

        Reading begins at once. The epochs are one stream: the first batches of an epoch are read
        and made while the last batches of the epoch before are in use. On CUDA, batches are packed
        on threads, and copied and decoded on another thread and a stream of its own. An error is
        raised in the place of the batch that it belongs to.

        Args:
            epochs: the numbers of the epochs.
            skip: number of batches of the first epoch to leave out, counted over all ranks, so that
                a run can go on with another number of ranks. Skipped batches are not read.
            prepare: called with each batch on the loader's thread and stream; what it returns is
                yielded in the place of the batch. By default batches are yielded as they are.
        """
        batches = self._epochs(epochs, skip, prepare or _unchanged)
        next(batches)
        return batches

    def _epochs(
        self, epochs: range, skip: int, prepare: Callable[[Batch], Prepared]
    ) -> Generator[Prepared | None]:
        """Yield None once reading has begun, then what `epochs` yields."""
        with _threads(min(WINDOW, os.cpu_count() or 1)) as readers:
            windows = self._windows(epochs, skip, readers)
            begun = iter([*islice(windows, 1)])  # the list would keep the first window
            yield None
            yield from self._batches(chain(begun, windows), len(epochs), prepare)

    def _batches(
        self, windows: Iterator[Window], epochs: int, prepare: Callable[[Batch], Prepared]
    ) -> Generator[Prepared | None]:
        """Yield the prepared batches of the windows of some epochs."""
        to_device = ToDevice(self._split.codecs, self._device, prepare, retry=self._in_parts)
        with self._packed(self._split_parts(windows)) as packed:
            if self._device.type != "cuda":
                # On the calling thread: a second thread that computes with torch slows down the
                # products of the first by a third. Blocks are read ahead in any case.
                for part in packed:
                    yield None if part is None else to_device.make(part)
                return
            if not self._in_parts:
                yield from to_device.make_ahead(packed, self._ahead)
                return
            for _ in range(epochs):
                epoch = chain(iter(partial(next, packed), None), [None])
                yield from to_device.make_ahead(epoch, self._ahead)

    @contextmanager
    def _packed(self, parts: Iterator[BatchPart | None]) -> Iterator[Iterator[Packed | None]]:
        """Pack the parts in order, on the calling thread or on threads ahead of it."""
        threads = PACKING_THREADS.get(self._device.type, 0)
        if not threads:
            yield map(self._pack, parts)
            return
        with _threads(threads) as pool:
            futures = (pool.submit(self._pack, part) for part in parts)
            yield map(Future.result, look_ahead(futures, threads))

    def _pack(self, part: BatchPart | None) -> Packed | None:
        if part is None:
            return None
        return pack(part, self._taps, self._split.specs, self._device, row_tokens=self._row_tokens)

    def _split_parts(self, windows: Iterator[Window]) -> Iterator[BatchPart | None]:
        """Yield the parts of each window's batches; the next window's blocks are read meanwhile."""
        return chain.from_iterable(starmap(self._window_parts, look_ahead(windows, 1)))

    def _window_parts(
        self, batches: list[Array | None], blocks: Blocks
    ) -> Iterator[BatchPart | None]:
        for items_S3 in batches:
            if items_S3 is None:
                yield None
            else:
                items = [(blocks[block].result(), index) for block, index, _ in items_S3.tolist()]
                yield from split_batch(items, self._part_tokens)

    def _windows(self, epochs: range, skip: int, readers: Executor) -> Iterator[Window]:
        """Yield the windows of some epochs; reading of a window's blocks begins with its yield."""
        blocks: Blocks = {}
        kept: Blocks = {}
        block_bytes = self._split.block_bytes(self._taps, top_ids=self._top_ids)
        most = self._kept_bytes // block_bytes if len(epochs) > 1 else 0
        for batches in self._order.windows(epochs, skip):
            numbers = [items_S3[:, 0].tolist() for items_S3 in batches if items_S3 is not None]
            blocks = {
                block: blocks.get(block)
                or kept.get(block)
                or readers.submit(self._split.stored, block, self._taps, self._top_ids)
                for block in dict.fromkeys(chain(*numbers))
            }
            others = (item for item in blocks.items() if item[0] not in kept)
            kept |= islice(others, most - len(kept))
            yield batches, blocks


def kept_bytes_per_loader(loaders: int) -> int:
    """Return the bytes of blocks that each of a run's loaders may keep between epochs.

    All together keep `KEPT_BYTES`, or an eighth of the free memory if that is less.
    """
    return min(KEPT_BYTES, free_memory(torch.device("cpu")) // 8) // loaders


def _unchanged(batch: Batch) -> Batch:
    return batch


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Provide threads until the block ends; work that no thread has begun by then is cancelled."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
