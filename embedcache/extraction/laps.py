"""Batches of the sample computed over and over: with nothing beside them, and beside commits.

A GPU is as fast as its kernels are launched where a base is small, and threads that commit blocks
take the interpreter's lock from the one that launches: how much is only seen beside them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
import torch

from embedcache.base.forward import BlockForward
from embedcache.base.load import Base
from embedcache.device import wait_for
from embedcache.extraction.sample import Array

IN_A_ROW = 3
"""Times that a batch is computed before the device is waited for, as a run hardly ever does."""
QUICK_SECONDS = 0.2
"""Batches that take longer are computed once: to wait for them is next to nothing of that."""
ENOUGH_SECONDS = 1.0
"""Batches are timed with nothing beside them until then."""
BESIDE_SECONDS = 1.5
"""And beside work, as a run computes; longer where there was too little of it by then."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch that was computed once, and the seconds that it took then."""

    ids_N: Array
    rows_B2: Array
    positions: int
    seconds: float


def is_launched(device: torch.device) -> bool:
    """Return whether a device computes what a thread launches, rather than the thread."""
    return device.type != "cpu"


class Laps:
    """Computes ``turns`` over and over: their shapes are planned, which is not timed again."""

    def __init__(self, base: Base, forward: BlockForward, turns: Sequence[Turn]):
        self._base = base
        self._forward = forward
        self._turns = turns
        quick = median(turn.seconds for turn in turns) < QUICK_SECONDS
        self._in_a_row = IN_A_ROW if quick else 1
        self._alone = self._times()

    def _times(self) -> list[float]:
        """Return the median seconds of each turn, nothing beside it.

        Where time does not suffice a batch takes long, and planning next to nothing of that.
        """
        times: list[list[float]] = [[] for _ in self._turns]
        ends = time.perf_counter() + ENOUGH_SECONDS
        for turn, taken in itertools.cycle(zip(self._turns, times, strict=True)):
            taken.append(self._each(turn))
            if time.perf_counter() > ends:
                break
        return [median(t or [turn.seconds]) for turn, t in zip(self._turns, times, strict=True)]

    def seconds_of(self, positions: Sequence[int]) -> float:
        """Return what batches of so many positions take, by those next to each in size."""
        by_size: dict[int, list[float]] = {}
        for turn, seconds in zip(self._turns, self._alone, strict=True):
            by_size.setdefault(turn.positions, []).append(seconds)
        sizes = sorted(by_size)
        return float(np.interp(positions, sizes, [mean(by_size[size]) for size in sizes]).sum())

    def sequence_seconds(self) -> float:
        """Return what a sequence takes that is computed alone; planning it is not timed."""
        alone = self._turns[0].ids_N, self._turns[0].rows_B2[:1]
        self._seconds(*alone, 1)
        return self._seconds(*alone, 1)

    def beside(
        self, begin: Callable[[int], Future[float]], *, every: int, at_once: int
    ) -> tuple[list[float], float]:
        """Begin pieces of work, one whenever so many positions were computed, as a run does.

        Work that is always there would make batches later than the run's does. ``begin`` is given
        its number; it waits where so many are under way ``at_once``. Returns what came of each, and
        by how much the batches beside one were late: less than nothing where those alone happened
        to be slower, so that the sum of both is what was seen beside work. Raises what that raises.
        """
        results, late = list[float](), list[float]()
        running: deque[Future[float]] = deque()
        positions, ends = 0, time.perf_counter() + BESIDE_SECONDS
        for turn, alone in itertools.cycle(zip(self._turns, self._alone, strict=True)):
            over = all(future.done() for future in running)
            if late and time.perf_counter() > ends and (over or len(late) > at_once):
                break
            while positions >= len(late) * every:
                if len(running) == at_once:
                    results.append(running.popleft().result())
                running.append(begin(len(late)))
                late.append(0.0)
            late[-1] += self._in_a_row * (self._each(turn) - alone)
            positions += self._in_a_row * turn.positions
        results += [future.result() for future in running]
        if len(late) > 1:
            late.pop()  # not all of its batches were computed
        return results, mean(late)

    def _each(self, turn: Turn) -> float:
        """Compute a turn some times in a row; return what one took."""
        return self._seconds(turn.ids_N, turn.rows_B2, self._in_a_row) / self._in_a_row

    def _seconds(self, ids_N: Array, rows_B2: Array, times: int) -> float:
        """Compute some of a block's sequences as the run does; return what it took."""
        started = time.perf_counter()
        for _ in range(times):
            self._forward(ids_N, rows_B2)
        wait_for(self._base.device)
        return time.perf_counter() - started
