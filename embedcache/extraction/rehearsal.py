"""A sample of embeddings encoded and committed as the run will, for its bytes and its time.

Axes: N rows of the sample, R rows of a block, H hidden.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.base.taps import FINAL
from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import Codec, codec_name
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import TOP_IDS, ExtractSettings
from embedcache.cache.shards.shard import shard_bytes
from embedcache.extraction.buffers import HostBuffers, Slot
from embedcache.extraction.encode import BlockEncoder, finite_rows
from embedcache.extraction.laps import Laps
from embedcache.extraction.top_ids import top_ids_of

Array = np.ndarray[Any, Any]

MOST = 8
"""Blocks that are committed, at most: what a small one takes differs from one to the next."""
ENCODINGS = 3
"""Times that a block is encoded, of which the shortest counts: the first one's memory is new."""
ENOUGH_SECONDS = 0.4
"""No further block is committed after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a codec makes of the sample: bytes of a row, of a block beside its rows, and time.

    Seconds are for each row, of blocks that are full.
    """

    row_bytes: float
    block_bytes: float
    row_seconds: float
    """Of encoding on the device, top ids included, and copying to the host."""
    commit_seconds: float
    """Of coding, hashing, writing and flushing, on one thread while others are at it, too."""
    late_seconds: float
    """By which the forward pass is late for committing beside it, or was early by chance."""
    arrays: tuple[str, ...]
    """Paths of a block's arrays under its split."""


def encoder_threads(device: torch.device) -> int:
    """Return how many threads commit blocks beside the forward pass.

    One where the CPU is the device, a few where a GPU would otherwise wait for zstd.
    """
    return 1 if device.type == "cpu" else min(4, os.cpu_count() or 1)


class Rehearsal:
    """Encodes and writes the sample x_NH as the run will, with the run's own parts."""

    def __init__(
        self,
        x_NH: dict[str, torch.Tensor],
        ids_N: Array,
        settings: ExtractSettings,
        head: Head,
        scratch: Path | None,
        laps: Laps | None = None,
        positions: int = 0,
    ):
        """Commit beside ``laps``, where what that takes from the forward pass is seen there only.

        They are one block's whenever they come to so many ``positions``. Without, it takes its
        seconds of a core: they are the device's.
        """
        self._x_NH = x_NH
        self._ids_N = ids_N
        self._settings = settings
        self._scratch = scratch
        self._laps = laps
        self._every = positions
        self._finite_N = finite_rows(x_NH)
        self._top_ids_NK: torch.Tensor | None = None
        self._top_ids_seconds = 0.0
        if settings.top_ids:
            # On a CPU once: it takes much longer than all other encoding there, and its memory is
            # little.
            seconds = []
            for _ in range(1 if x_NH[FINAL].is_cpu else ENCODINGS):
                started = time.perf_counter()
                self._top_ids_NK = top_ids_of(x_NH[FINAL], head, settings.top_ids).cpu()
                seconds.append(time.perf_counter() - started)
            self._top_ids_seconds = min(seconds)

    def of(self, names: set[str], codecs: dict[str, dict[str, Codec]]) -> dict[str, Encoded]:
        """Return what comes out for each of the splits."""
        by_codec: dict[str, Encoded] = {}
        found: dict[str, Encoded] = {}
        for name in sorted(names):
            codec = codec_name(name, self._settings.codec)
            if codec not in by_codec:
                by_codec[codec] = self._encoded(name, codecs[name])
            found[name] = by_codec[codec]
        return found

    def _encoded(self, name: str, codecs: dict[str, Codec]) -> Encoded:
        row_bytes, block_bytes, arrays = self._bytes(name, codecs)
        encode, commit, late = self._seconds(name, codecs)
        return Encoded(
            row_bytes=row_bytes,
            block_bytes=block_bytes,
            row_seconds=encode,
            commit_seconds=commit,
            late_seconds=late,
            arrays=arrays,
        )

    def _bytes(self, name: str, codecs: dict[str, Codec]) -> tuple[float, float, tuple[str, ...]]:
        """Code the sample as a block's shards are; what zeros take is no row's."""
        block_tokens = self._settings.block_tokens
        row_bytes, block_bytes = 0.0, 0.0
        ids_N = self._ids_N[self._finite_N.cpu().numpy()]
        rows = max(1, len(ids_N))
        x_NH = {tap: x[self._finite_N] for tap, x in self._x_NH.items()}
        encoder = BlockEncoder(name, self._settings, codecs)
        stored, _ = encoder(x_NH, ids_N, len(ids_N))
        if self._top_ids_NK is not None:
            stored[TOP_IDS] = self._top_ids_NK[self._finite_N.cpu()]
        for array, on_device in stored.items():
            spec, values = encoder.specs[array], on_device.cpu().numpy()
            coder, chunk = CODERS[spec.coder], chunk_rows(spec, block_tokens)
            if chunk > rows and spec.coder != "blosc":
                chunk = rows  # zeros after the rows would change how those are coded
            padded = np.zeros((-(-rows // chunk) * chunk, *values.shape[1:]), values.dtype)
            padded[: len(values)] = values
            full = shard_bytes(padded, chunk, coder)
            padded[:] = 0
            empty = shard_bytes(padded, chunk, coder)
            row_bytes += (full - empty) / rows
            block_bytes += empty * block_tokens / len(padded)
        return row_bytes, block_bytes, tuple(stored)

    def _seconds(self, name: str, codecs: dict[str, Codec]) -> tuple[float, float, float]:
        """Return the seconds of a row: of encoding, of committing, and lost to that beside it.

        Blocks are full of the sample over and over.
        """
        rows = self._settings.block_tokens
        device = self._finite_N.device
        threads = encoder_threads(device)
        places_R = np.arange(rows) % len(self._ids_N)
        on_device_R = torch.from_numpy(places_R).to(device)
        x_RH = {tap: x[on_device_R] for tap, x in self._x_NH.items()}
        ids_R = self._ids_N[places_R]
        encoder = BlockEncoder(name, self._settings, codecs)
        slots = HostBuffers(device, threads)
        found = {}
        if self._top_ids_NK is not None:
            found[TOP_IDS] = encoder.specs[TOP_IDS], self._top_ids_NK.numpy()[places_R]

        def encode() -> Slot:
            return slots.fetch(*encoder(x_RH, ids_R, rows))()

        held = [encode() for _ in range(threads)]  # what pinned memory takes is kept for the run
        encoding = float("inf")
        for _ in range(ENCODINGS):
            held.pop().release()
            started = time.perf_counter()
            held.append(encode())
            encoding = min(encoding, time.perf_counter() - started)
        with (
            tempfile.TemporaryDirectory(prefix="embedcache-", dir=self._scratch) as folder,
            closing(BlockWriter(Path(folder))) as writer,
            ThreadPoolExecutor(threads) as pool,
        ):

            def commit(block: int) -> tuple[float, float]:
                """Return the seconds that it took, and those of a core."""
                began, core = time.perf_counter(), time.thread_time()
                values = held[0].arrays.items()
                arrays = {path: (encoder.specs[path], value.numpy()) for path, value in values}
                writer.commit(name, block, arrays | found)
                return time.perf_counter() - began, time.thread_time() - core

            if self._laps is None:
                taken = [commit(0)]
                while len(taken) < MOST and sum(seconds for seconds, _ in taken) < ENOUGH_SECONDS:
                    taken.append(commit(len(taken)))
                spent, late = [seconds for seconds, _ in taken], median(core for _, core in taken)
            else:
                spent, late = self._laps.beside(
                    lambda block: pool.submit(lambda: commit(block)[0]),
                    every=self._every,
                    at_once=threads,
                )
        encoding = encoding / rows + self._top_ids_seconds / len(self._ids_N)
        return encoding, median(spent) / rows, late / rows
