"""A few batches of the blocks to come: computed and timed, then encoded and written for a try.

Axes: B sequences of a batch, T time, N rows, S sequences of a block, H hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.load import Base
from embedcache.cache.codecs import Codec
from embedcache.cache.layout import ExtractSettings
from embedcache.cache.tokens import SplitTokens
from embedcache.extraction.forward import BlockForward
from embedcache.extraction.rehearsal import Encoded, Rehearsal, encoder_threads
from embedcache.extraction.spread import Item, Known, SampledBlock, ids_of, rows_of, spread
from embedcache.progress import Progress

Array = np.ndarray[Any, Any]

ENOUGH_TOKENS = 2048
ENOUGH_BATCHES = 4
ENOUGH_SECONDS = 15.0
"""No further batch is measured after so long, once there are enough tokens."""
ENCODED_ROWS = 2048
"""Rows that are encoded of each batch, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the sample took. ``known``: the batches that were computed."""

    tokens: int = 0
    position_seconds: float = 0.0
    """Of the forward pass, for each position of a batch."""
    padding: float = 1.0
    """Positions for each token."""
    threads: int = 1
    """That commit blocks."""
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
    scratch: Path | None = None,
) -> Measured:
    """Compute, time and encode some batches of the blocks ``todo``, spread over all of them.

    ``codecs`` are those of each split's taps. Blocks of what came out are written in ``scratch``,
    a folder on the disk that the cache is to be on, or the system's temporary one, and removed.
    """
    todo = [(name, block) for name, block in todo if splits[name].block_rows(block)]
    if not todo:
        return Measured()
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
            padded += forward.positions(rows_B2)
            tokens += int((rows_B2[:, 1] - rows_B2[:, 0]).sum())
            bar.advance(int((rows_B2[:, 1] - rows_B2[:, 0]).sum()))
            if tokens >= ENOUGH_TOKENS and (count >= ENOUGH_BATCHES or seconds > ENOUGH_SECONDS):
                break
        x_NH = {tap: torch.cat(parts) for tap, parts in sample.items()}
        x_NH = {tap: x.to(base.device) for tap, x in x_NH.items()}
        encoded = Rehearsal(x_NH, np.concatenate(ids), settings, scratch).of({*dict(todo)}, codecs)
    rows = sum(int((block.rows_S2[:, 1] - block.rows_S2[:, 0]).sum()) for block in blocks.values())
    whole = sum(forward.positions(b.rows_S2[batch]) for b in blocks.values() for batch in b.batches)
    return Measured(
        tokens=tokens,
        position_seconds=seconds / padded,
        padding=whole / rows,
        threads=encoder_threads(base.device),
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
