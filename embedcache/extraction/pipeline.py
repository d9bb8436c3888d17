"""The pipeline of stage one: forward, encode and copy here, code and commit on threads beside."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.load import Base
from embedcache.cache.codecs import ArraySpec
from embedcache.cache.commit import BlockWriter, Marker, newest_generations
from embedcache.cache.prefetch import prefetch
from embedcache.cache.tokens import SplitTokens
from embedcache.extraction.buffers import HostBuffers, Slot
from embedcache.extraction.encoder import BlockEncoder
from embedcache.extraction.forward import CHECK_EVERY, BlockForward
from embedcache.extraction.measure import Item
from embedcache.extraction.preflight import encoder_threads, tokens_to_go
from embedcache.extraction.quarantine import Quarantine
from embedcache.progress import Bar, Progress

Embeddings = dict[str, torch.Tensor]


class Pipeline:
    """Computes and commits blocks of one cache."""

    def __init__(
        self,
        out: Path,
        splits: dict[str, SplitTokens],
        base: Base,
        forward: BlockForward,
        encoders: dict[str, BlockEncoder],
        quarantine: Quarantine,
        progress: Progress,
    ):
        self._out = out
        self._splits = splits
        self._base = base
        self._forward = forward
        self._encoders = encoders
        self._quarantine = quarantine
        self._progress = progress

    def run(
        self,
        todo: list[Item],
        markers: dict[str, dict[int, Marker]],
        known: dict[Item, dict[int, Embeddings]],
        computed: dict[Item, Embeddings],
    ) -> tuple[float, int, float]:
        """Commit the blocks ``todo``, adding to ``markers`` by split.

        Args:
            todo: the blocks, in the order in which they are computed.
            markers: the committed blocks of each split.
            known: what is known of blocks from measuring, by batch.
            computed: blocks that are known whole, from calibrating.

        Returns:
            The self-check's largest difference, the tokens, and the seconds that it took.
        """
        base, forward, encoders = self._base, self._forward, self._encoders
        newest = {name: newest_generations(self._out, name) for name in self._splits}
        worst, started = 0.0, time.perf_counter()
        writer = BlockWriter(self._out)
        threads = encoder_threads(base.device)
        slots = HostBuffers(base.device, count=threads + 1)
        futures: list[tuple[str, int, int, Future[Marker]]] = []
        total = sum(tokens_to_go(self._splits, todo).values())
        pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        try:
            with self._progress.bar("extracting", total, "tok") as bar:
                read = ((*item, *self._splits[item[0]].read(item[1])) for item in todo)
                for number, (name, block, ids_N, rows_S2, first) in enumerate(prefetch(read)):
                    part = known.pop((name, block), {})
                    x_NH = computed.pop((name, block), None) or forward(ids_N, rows_S2, part)
                    x_NH = {tap: x.to(base.device) for tap, x in x_NH.items()}
                    if number % CHECK_EVERY == 0:
                        sample = 2 if number == 0 else 1
                        worst = max(worst, forward.check(ids_N, rows_S2, x_NH, sample))
                    rows = self._splits[name].block_rows(block)
                    ready = slots.fetch(*encoders[name](x_NH, ids_N, rows))
                    specs = encoders[name].specs
                    generation = newest[name].get(block, -1) + 1
                    future = pool.submit(
                        self._write, writer, name, block, generation, ready, specs, rows_S2, first
                    )
                    futures.append((name, block, rows, future))
                    futures = self._settle(futures, markers, bar, wait=False)
                self._settle(futures, markers, bar, wait=True)
        finally:
            pool.shutdown(wait=True)
            writer.close()
        return worst, total, time.perf_counter() - started

    def _write(
        self,
        writer: BlockWriter,
        name: str,
        block: int,
        generation: int,
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
            return writer.commit(
                name, block, arrays, quarantined=quarantined, generation=generation
            )
        finally:
            slot.release()

    def _settle(
        self,
        futures: list[tuple[str, int, int, Future[Marker]]],
        markers: dict[str, dict[int, Marker]],
        bar: Bar,
        *,
        wait: bool,
    ) -> list[tuple[str, int, int, Future[Marker]]]:
        """Take note of the blocks that are committed; return those that are not."""
        pending = []
        for name, block, rows, future in futures:
            if not wait and not future.done():
                pending.append((name, block, rows, future))
                continue
            marker = future.result()
            markers[name][block] = marker
            self._quarantine.count(name, marker)
            bar.advance(rows, f"{sum(record.bytes for record in marker.files) / 1e6:.1f} MB/block")
            self._quarantine.check()
        return pending
