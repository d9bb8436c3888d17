"""What batches take that are computed over and over: alone, by size, and beside other work."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.extraction import laps
from embedcache.extraction.laps import Laps, Turn

BASE: Any = SimpleNamespace(device=torch.device("cpu"))


def laps_of(forward: Callable[[int], None], *sizes: int, planned: float = 9.0) -> Laps:
    """Return laps over batches of two like sequences; ``forward`` is told how many tokens."""

    def compute(ids_N: Any, rows_B2: Any) -> None:
        forward(int((rows_B2[:, 1] - rows_B2[:, 0]).sum()))

    turns = [Turn(np.arange(9), np.array([[0, size // 2]] * 2), size, planned) for size in sizes]
    computing: Any = compute
    return Laps(BASE, computing, turns)


class Clock:
    """Time that passes only where one says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(laps, "time", clock)
    return clock


def test_batches_take_what_those_next_to_them_in_size_do(clock: Clock) -> None:
    launched = laps_of(lambda size: clock.sleep(0.01), 1000, 100)
    assert launched.seconds_of([1000, 700, 100, 20]) == pytest.approx(0.04)
    computed = laps_of(lambda size: clock.sleep(size * 1e-5), 1000, 100, 100)
    assert computed.seconds_of([1000, 550, 100]) == pytest.approx(0.0165)


def test_a_device_is_not_waited_for_after_each_batch(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0.0

    def launch(size: int) -> None:  # the device ends half a batch later
        nonlocal done
        clock.sleep(0.01)
        done = clock.now + 0.005

    monkeypatch.setattr(laps, "wait_for", lambda device: clock.sleep(max(0.0, done - clock.now)))
    quick = laps_of(launch, 10, planned=0.01)
    assert quick.seconds_of([10]) == pytest.approx(0.01 + 0.005 / laps.IN_A_ROW)
    slow = laps_of(launch, 10, planned=9.0)
    assert slow.seconds_of([10]) == pytest.approx(0.015)


def test_a_sequence_is_computed_alone(clock: Clock) -> None:
    some = laps_of(lambda size: clock.sleep(size / 100), 40, 10)
    assert some.sequence_seconds() == pytest.approx(0.2)


def test_batches_are_repeated_for_a_while_and_what_is_slow_at_times_is_left_out(
    clock: Clock,
) -> None:
    takes = itertools.chain([0.05] * 8, itertools.repeat(0.02))
    some = laps_of(lambda size: clock.sleep(next(takes)), 10, planned=9.0)
    assert laps.ENOUGH_SECONDS < clock.now < laps.ENOUGH_SECONDS + 0.06
    assert some.seconds_of([10]) == pytest.approx(0.02)


def test_batches_that_time_does_not_suffice_for_take_what_they_took(clock: Clock) -> None:
    some = laps_of(lambda size: clock.sleep(0.6), 10, 20, 30, planned=5.0)
    assert [some.seconds_of([size]) for size in (10, 20, 30)] == pytest.approx([0.6, 0.6, 5.0])


class Work(Future[Any]):
    """Work beside batches, whose time passes by a clock; it comes to ``value``."""

    def __init__(self, clock: Clock, seconds: float, value: Any = 0.0) -> None:
        super().__init__()
        self._clock, self._ends = clock, clock.now + seconds
        self.set_result(value)

    def done(self) -> bool:
        return self._clock.now >= self._ends

    def result(self, timeout: float | None = None) -> Any:
        self._clock.sleep(max(0.0, self._ends - self._clock.now))
        return super().result(timeout)


def test_batches_are_late_beside_what_holds_the_lock_and_no_other(clock: Clock) -> None:
    free = 0.0  # when the lock is

    def launch(size: int) -> None:
        clock.sleep(max(0.0, free - clock.now) + 0.01)

    def hold(number: int) -> Work:
        nonlocal free
        free = clock.now + 0.03
        return Work(clock, 0.03, number)

    launched = laps_of(launch, 10, 20, planned=0.01)  # some in a row
    started = clock.now
    results, late = launched.beside(hold, every=90, at_once=4)
    assert results == [*range(len(results))]
    assert late == pytest.approx(0.03)
    # One for each two turns, which take 0.06 s, and 0.03 s that they wait.
    assert len(results) == pytest.approx((clock.now - started) / 0.09, abs=1)
    results, late = launched.beside(lambda n: Work(clock, 0.03, n), every=60, at_once=4)
    assert results == [*range(len(results))]
    assert late == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("at_once", "between", "most"), [(4, 0.05, 2), (2, 0.05, 2), (1, 0.1, 1)], ids=str
)
def test_work_is_begun_as_blocks_are_computed_and_waits_for_what_is_under_way(
    clock: Clock, at_once: int, between: float, most: int
) -> None:
    """Of 0.1 s, begun at every fifth batch of 0.01 s: two pieces at a time, where that may be."""
    begun: list[float] = []
    under_way: list[int] = []
    works: list[Work] = []

    def begin(number: int) -> Work:
        begun.append(clock.now)
        works.append(Work(clock, 0.0999, number))  # done before the tenth batch, for certain
        under_way.append(sum(not work.done() for work in works))
        return works[-1]

    some = laps_of(lambda size: clock.sleep(0.01), 10)
    started = clock.now
    results, late = some.beside(begin, every=50, at_once=at_once)
    assert results == [*range(len(begun))]
    assert begun[0] == started
    gaps = [later - earlier for earlier, later in pairwise(begun)]
    assert gaps == pytest.approx([between] * len(gaps), abs=1e-3)
    assert len(begun) == pytest.approx(laps.BESIDE_SECONDS / between, abs=2)
    assert max(under_way) == most
    assert late == pytest.approx(0.0)  # to wait for a place is not to be late


def test_a_slow_block_is_not_waited_for_once_its_work_is_done(clock: Clock) -> None:
    some = laps_of(lambda size: clock.sleep(0.05), 10)
    started = clock.now
    results, _ = some.beside(lambda n: Work(clock, 0.01, n), every=10_000, at_once=4)
    assert results == [0]
    assert clock.now - started < laps.BESIDE_SECONDS + 0.1


def test_what_fails_beside_batches_is_raised(clock: Clock) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    some = laps_of(lambda size: clock.sleep(0.01), 10)
    with (
        ThreadPoolExecutor(4) as pool,
        pytest.raises(OSError, match="the disk is full"),
    ):
        some.beside(lambda _: pool.submit(fail), every=10, at_once=1)


def test_batches_that_were_slower_alone_by_chance_count_as_they_are_beside_work(
    clock: Clock,
) -> None:
    takes = 0.05
    some = laps_of(lambda size: clock.sleep(takes), 10)
    takes = 0.02
    _, late = some.beside(lambda number: Work(clock, 0.1, number), every=100, at_once=4)
    assert some.seconds_of([10] * 10) + late == pytest.approx(0.2)
