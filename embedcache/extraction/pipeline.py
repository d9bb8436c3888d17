"""The pipeline of stage one: forward, encode and copy here, code and commit on threads beside."""

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
from embedcache.extraction.block_queue import Deal
from embedcache.extraction.buffers import HostBuffers, Slot
from embedcache.extraction.encode import BlockEncoder
from embedcache.extraction.preflight import tokens_to_go
from embedcache.extraction.quarantine import Quarantine
from embedcache.extraction.rehearsal import encoder_threads
from embedcache.extraction.sample import Item, Known
from embedcache.progress import Bar, Progress
from embedcache.store.lease import PATIENCE_SECONDS, Leases

Array = np.ndarray[Any, Any]
Read = tuple[Item, Array, Array, int]
"""A block, its ids_N, the rows_S2 of its sequences, and the number of the first."""


class Pipeline:
    """Computes and commits blocks of one cache, those that no other process has claimed."""

    def __init__(
        self,
        out: Path,
        leases: Leases,
        splits: dict[str, SplitTokens],
        base: Base,
        forward: BlockForward,
        encoders: dict[str, BlockEncoder],
        quarantine: Quarantine,
        progress: Progress,
    ):
        self._out = out
        self._leases = leases
        self._splits = splits
        self._base = base
        self._forward = forward
        self._encoders = encoders
        self._quarantine = quarantine
        self._progress = progress

    def run(
        self,
        todo: list[Item],
        known: Known,
        generations: dict[str, dict[int, int]],
    ) -> tuple[float, int]:
        """Have the blocks ``todo`` committed, here or by others.

        Args:
            todo: the blocks, in the order in which they are computed.
            known: what is known of blocks from calibrating and measuring.
            generations: of the markers to make, where they are not the first of their block.

        Returns:
            The self-check's largest difference, and the tokens computed here.
        """
        base, forward, encoders = self._base, self._forward, self._encoders
        deal = Deal(self._out, self._leases, todo, generations)
        worst, number, tokens = 0.0, 0, 0
        waiting: float | None = None
        writer = BlockWriter(self._out, self._leases.attempt)
        threads = encoder_threads(base.device)
        slots = HostBuffers(base.device, count=threads + 1)
        futures: list[Future[Marker]] = []
        total = sum(tokens_to_go(self._splits, todo).values())
        pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        try:
            with (
                self._progress.bar("extracting", total, "tok") as bar,
                closing(prefetch(self._read(deal))) as dealt,
            ):
                for entry in dealt:
                    if not isinstance(entry, tuple):
                        futures = self._settle(futures, bar, wait=False)
                        if entry is None:
                            waiting = self._wait(waiting)
                        else:
                            self._note(entry, bar)
                        continue
                    (name, block), ids_N, rows_S2, first = entry
                    x_NH = forward(ids_N, rows_S2, known.pop((name, block), {}))
                    if number % CHECK_EVERY == 0:
                        sample = 2 if number == 0 else 1
                        worst = max(worst, forward.check(ids_N, rows_S2, x_NH, sample))
                    rows = self._splits[name].block_rows(block)
                    ready = slots.fetch(*encoders[name](x_NH, ids_N, rows))
                    specs = encoders[name].specs
                    future = pool.submit(
                        self._write, writer, deal, (name, block), ready, specs, rows_S2, first
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

    def _read(self, deal: Deal) -> Iterator[Read | Marker | None]:
        """Read the blocks that are dealt to this process; pass on what is said of others."""
        for dealt in deal:
            if isinstance(dealt, tuple):
                yield (dealt, *self._splits[dealt[0]].read(dealt[1]))
            else:
                yield dealt

    def _wait(self, since: float | None) -> float:
        """Say once, after a moment, for whom this process waits; return since when it does."""
        now = time.monotonic()
        if since is None:
            return now
        if since < now - PATIENCE_SECONDS:
            others = ", ".join(map(str, self._leases.others())) or "a process that is gone"
            self._progress.say(f"nothing is left to lease: waiting for blocks of {others}")
            return float("inf")
        return since

    def _write(
        self,
        writer: BlockWriter,
        deal: Deal,
        item: Item,
        ready: Callable[[], Slot],
        specs: dict[str, ArraySpec],
        rows_S2: np.ndarray[Any, Any],
        first: int,
    ) -> Marker:
        slot = ready()
        try:
            bad = [i for i, (a, b) in enumerate(rows_S2.tolist()) if not slot.finite_N[a:b].all()]
            for values in slot.arrays.values():
                for index in bad:
                    values[rows_S2[index, 0] : rows_S2[index, 1]] = 0
            arrays = {path: (specs[path], values.numpy()) for path, values in slot.arrays.items()}
            quarantined = tuple(first + index for index in bad)
            generation = deal.generation(item)
            marker = writer.commit(*item, arrays, quarantined=quarantined, generation=generation)
            deal.done(item)
            return marker
        finally:
            slot.release()

    def _settle(
        self,
        futures: list[Future[Marker]],
        bar: Bar,
        *,
        wait: bool,
    ) -> list[Future[Marker]]:
        """Take note of the blocks that are committed; return those that are not."""
        pending = []
        for future in futures:
            if not wait and not future.done():
                pending.append(future)
                continue
            self._note(future.result(), bar)
        return pending

    def _note(self, marker: Marker, bar: Bar) -> None:
        """Count a block that is committed, here or by another process."""
        self._quarantine.count(marker.split, marker)
        rows = self._splits[marker.split].block_rows(marker.block)
        bar.advance(rows, f"{sum(record.bytes for record in marker.files) / 1e6:.1f} MB/block")
        self._quarantine.check()
