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

from embedcache.base.forward import BlockForward
from embedcache.base.load import Base
from embedcache.cache.codecs.integers import Codec
from embedcache.cache.format.layout import ExtractSettings
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.device import wait_for
from embedcache.extraction.laps import Laps, Turn, is_launched
from embedcache.extraction.rehearsal import Encoded, Rehearsal, encoder_threads
from embedcache.extraction.sample import Item, Known, SampledBlock, ids_of, rows_of, spread
from embedcache.progress import Progress

Array = np.ndarray[Any, Any]

ENOUGH_TOKENS = 2048
ENOUGH_BATCHES = 4
ENOUGH_SECONDS = 15.0
"""No further batch is measured after so long, once there are enough tokens."""
CHEAP_SECONDS, AGAIN = 3.0, 2
"""A CPU's batches that took less are timed so often again, and the fastest time counts: memory is
new to the process at first, and what others do on the machine for a moment is not what they do all
the time."""
ENCODED_ROWS = 2048
"""Rows that are encoded of each batch, at most."""
PLANS = 64
"""Blocks whose batches are planned, about: how many there are and how full differs."""


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
    check_seconds: float = 0.0
    """Of a sequence's forward pass, computed alone."""
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
    sample = _Sample(base, forward)
    x_PNH: dict[str, list[torch.Tensor]] = {tap: [] for tap in settings.taps}
    ids: list[Array] = []
    tokens = 0
    with progress.bar("measuring", None, "tok") as bar:
        for item, number in spread(splits, todo, forward, sample.blocks):
            ids_N, rows_B2 = sample.compute(item, number)
            for tap, x in sample.known[item][number].items():
                x_PNH[tap].append(rows_of(x, rows_B2)[:ENCODED_ROWS])
            ids.append(ids_of(ids_N, rows_B2)[:ENCODED_ROWS])
            count = int((rows_B2[:, 1] - rows_B2[:, 0]).sum())
            tokens += count
            bar.advance(count)
            enough = len(sample.turns) >= ENOUGH_BATCHES or sample.seconds > ENOUGH_SECONDS
            if tokens >= ENOUGH_TOKENS and enough:
                break
        plans = [splits[name].offsets(block) for name, block in todo[:: -(-len(todo) // PLANS)]]
        rows = sum(int((rows_S2[:, 1] - rows_S2[:, 0]).sum()) for rows_S2 in plans)
        positions = [
            forward.positions(rows_S2[batch])
            for rows_S2 in plans
            for batch in forward.batches(rows_S2)
        ]
        if is_launched(base.device):
            laps = sample.laps()
            position_seconds = laps.seconds_of(positions) / sum(positions)
            check_seconds = laps.sequence_seconds()
        else:
            laps = None
            again = range(AGAIN if sample.seconds < CHEAP_SECONDS else 0)
            seconds = min([sample.seconds, *(sample.seconds_again() for _ in again)])
            position_seconds = seconds / sum(turn.positions for turn in sample.turns)
            check_seconds = position_seconds * rows / sum(map(len, plans))
        x_NH = {tap: torch.cat(parts).to(base.device) for tap, parts in x_PNH.items()}
        padding = sum(positions) / rows
        block_positions = round(settings.block_tokens * padding)
        rehearsal = Rehearsal(
            x_NH,
            np.concatenate(ids),
            settings,
            base.head,
            scratch,
            laps,
            positions=block_positions,
        )
        encoded = rehearsal.of({*dict(todo)}, codecs)
    return Measured(
        tokens=tokens,
        position_seconds=position_seconds,
        padding=padding,
        threads=encoder_threads(base.device),
        check_seconds=check_seconds,
        encoded=encoded,
        known=sample.known,
    )


class _Sample:
    """The batches that are computed, and what they took."""

    def __init__(self, base: Base, forward: BlockForward):
        self._base = base
        self._forward = forward
        self.blocks: dict[Item, SampledBlock] = {}
        self.known: Known = {}
        self.turns: list[Turn] = []
        self.seconds = 0.0

    def compute(self, item: Item, number: int) -> tuple[Array, Array]:
        """Compute and time a batch; return its block's ids_N, and its rows_B2."""
        ids_N, rows_B2 = self.blocks[item].ids_N, self.blocks[item].rows(number)
        if not self.turns:
            self._warm_up(ids_N, rows_B2)
        started = time.perf_counter()
        x_BTH = self._forward.batch(ids_N, rows_B2)
        wait_for(self._base.device)
        seconds = time.perf_counter() - started
        self.known.setdefault(item, {})[number] = {tap: x.cpu() for tap, x in x_BTH.items()}
        self.turns.append(Turn(ids_N, rows_B2, self._forward.positions(rows_B2), seconds))
        self.seconds += seconds
        return ids_N, rows_B2

    def seconds_again(self) -> float:
        """Compute all that was computed, once more; return what it took."""
        started = time.perf_counter()
        for turn in self.turns:
            self._forward.batch(turn.ids_N, turn.rows_B2)
        wait_for(self._base.device)
        return time.perf_counter() - started

    def laps(self) -> Laps:
        """Have them computed over and over; with the fullest batch and the emptiest among them."""
        sizes = {
            (item, number): self._forward.positions(block.rows(number))
            for item, block in self.blocks.items()
            for number in range(len(block.batches))
        }
        for item, number in (max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)):
            if number not in self.known[item]:
                self.compute(item, number)
        return Laps(self._base, self._forward, self.turns)

    def _warm_up(self, ids_N: Array, rows_B2: Array) -> None:
        """Make the first forward pass untimed: a whole one where it is cheap, else a short one."""
        if not is_launched(self._base.device):
            first, stop = (int(v) for v in rows_B2[0])
            rows_B2 = np.array([[first, min(stop, first + 64)]])
        self._forward.batch(ids_N, rows_B2)
        wait_for(self._base.device)
