"""The pipeline of a run: this thread computes and encodes blocks, other threads commit them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.base.forward import CHECK_EVERY, BlockForward
from embedcache.base.load import Base
from embedcache.cache.blocks.commit import BlockWriter, Marker
from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.data.prefetch import prefetch
from embedcache.extraction.block_queue import BlockQueue, CommittedBlocks
from embedcache.extraction.encode import BlockEncoder, HostBuffers, Slot
from embedcache.extraction.estimate import commit_threads, tokens_of
from embedcache.extraction.sample import BlockId, ComputedBatches
from embedcache.progress import Bar, Progress
from embedcache.store.lease import PATIENCE_SECONDS, Leases

Array = np.ndarray[Any, Any]
BlockTokens = tuple[BlockId, Array, Array, int]
"""A block, its ids_N, the rows_S2 of its sequences, and the number of the first sequence."""


class Pipeline:
    """Computes and commits the blocks of one cache that no other process has leased."""

    def __init__(
        self,
        out: Path,
        leases: Leases,
        splits: dict[str, SplitTokens],
        base: Base,
        forward: BlockForward,
        encoders: dict[str, BlockEncoder],
        committed: CommittedBlocks,
        progress: Progress,
    ):
        self._out = out
        self._leases = leases
        self._splits = splits
        self._base = base
        self._forward = forward
        self._encoders = encoders
        self._committed = committed
        self._progress = progress

    def run(self, blocks: list[BlockId], computed: ComputedBatches) -> tuple[float, int]:
        """Return when all ``blocks`` are committed, by this process or by others.

        Args:
            blocks: the blocks, in the order in which they are computed.
            computed: batches of them that are computed already.

        Returns:
            The largest relative difference that the self-checks found, and the number of tokens
            that this process computed.
        """
        forward, encoders = self._forward, self._encoders
        block_queue = BlockQueue(self._out, self._leases, blocks)
        worst, number, tokens = 0.0, 0, 0
        waiting: float | None = None
        writer = BlockWriter(self._out, self._leases.attempt)
        threads = commit_threads(self._base.device)
        slots = HostBuffers(self._base.device, count=threads + 1)
        futures: list[Future[Marker]] = []
        total = sum(tokens_of(self._splits, blocks).values())
        pool = ThreadPoolExecutor(threads, thread_name_prefix="commit")
        try:
            with (
                self._progress.bar("extracting", total, "tok") as bar,
                closing(prefetch(self._read(block_queue))) as entries,
            ):
                for entry in entries:
                    if not isinstance(entry, tuple):
                        futures = self._settle(futures, bar, wait=False)
                        if entry is None:
                            waiting = self._wait(waiting)
                        else:
                            self._note(entry, bar)
                        continue
                    block, ids_N, rows_S2, first = entry
                    x_NH = forward(ids_N, rows_S2, computed.pop(block))
                    if number % CHECK_EVERY == 0:
                        sample = 2 if number == 0 else 1
                        worst = max(worst, forward.check(ids_N, rows_S2, x_NH, sample))
                    name = block[0]
                    rows = self._splits[name].block_rows(block[1])
                    ready = slots.fetch(*encoders[name](x_NH, ids_N, rows))
                    specs = encoders[name].specs
                    future = pool.submit(
                        self._commit, writer, block_queue, block, ready, specs, rows_S2, first
                    )
                    number += 1
                    tokens += rows
                    futures.append(future)
                    futures = self._settle(futures, bar, wait=False)
                self._settle(futures, bar, wait=True)
        finally:
            pool.shutdown(wait=True)
            writer.close()
        return worst, tokens

    def _read(self, block_queue: BlockQueue) -> Iterator[BlockTokens | Marker | None]:
        """Read the blocks that this process is to compute; pass on the other entries."""
        for entry in block_queue:
            if isinstance(entry, tuple):
                yield (entry, *self._splits[entry[0]].read(entry[1]))
            else:
                yield entry

    def _wait(self, since: float | None) -> float:
        """Report once which processes this one waits for; return since when it waits."""
        now = time.monotonic()
        if since is None:
            return now
        if since < now - PATIENCE_SECONDS:
            others = ", ".join(map(str, self._leases.others())) or "a process that has ended"
            self._progress.say(f"all remaining blocks are leased: waiting for {others}")
            return float("inf")
        return since

    def _commit(
        self,
        writer: BlockWriter,
        block_queue: BlockQueue,
        block: BlockId,
        ready: Callable[[], Slot],
        specs: dict[str, ArraySpec],
        rows_S2: Array,
        first: int,
    ) -> Marker:
        """Commit a block. Sequences with rows that are not finite are quarantined and zeroed."""
        slot = ready()
        try:
            bad = [i for i, (a, b) in enumerate(rows_S2.tolist()) if not slot.finite_N[a:b].all()]
            for values in slot.arrays.values():
                for index in bad:
                    values[rows_S2[index, 0] : rows_S2[index, 1]] = 0
            arrays = {path: (specs[path], values.numpy()) for path, values in slot.arrays.items()}
            quarantined = tuple(first + index for index in bad)
            marker = writer.commit(*block, arrays, quarantined=quarantined)
            block_queue.done(block)
            return marker
        finally:
            slot.release()

    def _settle(
        self, futures: list[Future[Marker]], bar: Bar, *, wait: bool
    ) -> list[Future[Marker]]:
        """Count the blocks that are committed and return the futures of the others."""
        pending = []
        for future in futures:
            if not wait and not future.done():
                pending.append(future)
                continue
            self._note(future.result(), bar)
        return pending

    def _note(self, marker: Marker, bar: Bar) -> None:
        """Count a committed block, of this process or another."""
        self._committed.add(marker)
        rows = self._splits[marker.split].block_rows(marker.block)
        bar.advance(rows, f"{sum(record.bytes for record in marker.files) / 1e6:.1f} MB/block")
        self._committed.check_quarantined()
