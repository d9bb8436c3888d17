"""A few batches of the blocks to come: computed, timed and encoded.

Axes: B sequences of a batch, T time, N rows, S sequences of a block, H hidden.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.load import Base
from embedcache.cache.arrays import chunk_rows
from embedcache.cache.codecs import ARRAYS, Codec, codec_name
from embedcache.cache.coders import CODERS
from embedcache.cache.layout import ExtractSettings
from embedcache.cache.shard import write_shard
from embedcache.cache.tokens import SplitTokens
from embedcache.extraction.forward import BlockForward
from embedcache.extraction.spread import Item, Known, SampledBlock, ids_of, rows_of, spread
from embedcache.progress import Progress
from embedcache.units import rounded_up

Array = np.ndarray[Any, Any]

ENOUGH_TOKENS = 2048
ENOUGH_BATCHES = 4
ENOUGH_SECONDS = 15.0
"""No further batch is measured after so long, once there are enough tokens."""
ENCODED_ROWS = 2048
"""Rows that are encoded of each batch, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a codec makes of the sample: bytes of a row, of a block beside its rows, and time."""

    row_bytes: float
    block_bytes: float
    row_seconds: float
    arrays: tuple[str, ...]
    """Paths of a block's arrays under its split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the sample took. ``known``: the batches that were computed."""

    tokens: int = 0
    seconds: float = 0.0
    """Of everything that was done here."""
    token_seconds: float = 0.0
    """Of the forward pass, for each token, padding included in its price."""
    sequence_tokens: float = 0.0
    """Mean length of the sampled blocks' sequences."""
    encoded: dict[str, Encoded] = field(default_factory=dict)
    """By split."""
    known: Known = field(default_factory=dict)


def measure(
    base: Base,
    forward: BlockForward,
    splits: dict[str, SplitTokens],
    todo: list[Item],
    settings: ExtractSettings,
    codecs: dict[str, dict[str, Codec]],
    progress: Progress,
) -> Measured:
    """Compute, time and encode some batches of the blocks ``todo``, spread over all of them.

    ``codecs`` are those of each split's taps.
    """
    todo = [(name, block) for name, block in todo if splits[name].block_rows(block)]
    if not todo:
        return Measured()
    began = time.perf_counter()
    blocks: dict[Item, SampledBlock] = {}
    known: Known = {}
    sample: dict[str, list[torch.Tensor]] = {tap: [] for tap in settings.taps}
    ids: list[Array] = []
    count, tokens, padded, seconds = 0, 0, 0, 0.0
    with progress.bar("measuring", None, "tok") as bar:
        for item, number in spread(splits, todo, forward, blocks):
            block = blocks[item]
            rows_B2 = block.rows(number)
            if not count:
                _warm_up(base, forward, block.ids_N, rows_B2)
            started = time.perf_counter()
            x_BTH = forward.batch(block.ids_N, rows_B2)
            _wait(base)
            seconds += time.perf_counter() - started
            known.setdefault(item, {})[number] = {tap: x.cpu() for tap, x in x_BTH.items()}
            for tap, x in known[item][number].items():
                sample[tap].append(rows_of(x, rows_B2)[:ENCODED_ROWS])
            ids.append(ids_of(block.ids_N, rows_B2)[:ENCODED_ROWS])
            count += 1
            padded += block.padded(number)
            tokens += int((rows_B2[:, 1] - rows_B2[:, 0]).sum())
            bar.advance(int((rows_B2[:, 1] - rows_B2[:, 0]).sum()))
            if tokens >= ENOUGH_TOKENS and (count >= ENOUGH_BATCHES or seconds > ENOUGH_SECONDS):
                break
        x_NH = {tap: torch.cat(parts) for tap, parts in sample.items()}
        encoded = _encode_all(x_NH, np.concatenate(ids), {*dict(todo)}, codecs, settings)
    rows = sum(int((block.rows_S2[:, 1] - block.rows_S2[:, 0]).sum()) for block in blocks.values())
    whole = sum(b.padded(number) for b in blocks.values() for number in range(len(b.batches)))
    return Measured(
        tokens=tokens,
        seconds=time.perf_counter() - began,
        token_seconds=seconds / padded * whole / rows,
        sequence_tokens=rows / sum(len(block.rows_S2) for block in blocks.values()),
        encoded=encoded,
        known=known,
    )


def _warm_up(base: Base, forward: BlockForward, ids_N: Array, rows_B2: Array) -> None:
    """Make the first forward pass untimed: whole on a GPU, where it is cheap, else a short one."""
    if base.device.type == "cpu":
        first, stop = (int(v) for v in rows_B2[0])
        rows_B2 = np.array([[first, min(stop, first + 64)]])
    forward.batch(ids_N, rows_B2)
    _wait(base)


def _wait(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


def _encode_all(
    x_NH: dict[str, torch.Tensor],
    ids_N: Array,
    names: set[str],
    codecs: dict[str, dict[str, Codec]],
    settings: ExtractSettings,
) -> dict[str, Encoded]:
    by_codec: dict[str, Encoded] = {}
    found: dict[str, Encoded] = {}
    with tempfile.TemporaryDirectory(prefix="embedcache-") as scratch:
        for name in sorted(names):
            codec = codec_name(name, settings.codec)
            if codec not in by_codec:
                by_codec[codec] = _encode(
                    x_NH, ids_N, codec, codecs[name], settings.block_tokens, Path(scratch) / "shard"
                )
            found[name] = by_codec[codec]
    return found


def _encode(
    x_NH: dict[str, torch.Tensor],
    ids_N: Array,
    name: str,
    codecs: dict[str, Codec],
    block_tokens: int,
    scratch: Path,
) -> Encoded:
    """Write the sample as a block's shards are written; what zeros take is no row's."""
    row_bytes, block_bytes, seconds = 0.0, 0.0, 0.0
    arrays: list[str] = []
    rows = 0
    for tap, x in x_NH.items():
        finite = x.float().sum(dim=1).isfinite()
        rows = max(1, int(finite.sum()))
        started = time.perf_counter()
        stored = codecs[tap].encode(x[finite], ids_N[finite.numpy()])
        for spec in ARRAYS[name]:
            values = stored[spec.group].numpy()
            coder, chunk = CODERS[spec.coder], chunk_rows(spec, block_tokens)
            if chunk > rows and spec.coder != "blosc":
                chunk = rows  # zeros after the rows would change how those are coded
            padded = np.zeros((rounded_up(rows, chunk), *values.shape[1:]), values.dtype)
            padded[: len(values)] = values
            full, _ = write_shard(scratch, padded, chunk, coder)
            seconds += time.perf_counter() - started
            padded[:] = 0
            empty, _ = write_shard(scratch, padded, chunk, coder)
            row_bytes += (full - empty) / rows
            block_bytes += empty * block_tokens / len(padded)
            arrays.append(f"{spec.group}/{tap}")
            started = time.perf_counter()
    return Encoded(
        row_bytes=row_bytes,
        block_bytes=block_bytes,
        row_seconds=seconds / rows,
        arrays=tuple(arrays),
    )
