"""What batches take that are computed over and over: alone, by size, and beside other work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from spinning import spin

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


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Threads for work beside batches, which take real time: little of it."""
    monkeypatch.setattr(laps, "ENOUGH_SECONDS", 0.2)
    monkeypatch.setattr(laps, "BESIDE_SECONDS", 0.6)
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.slow  # of time that passes: for a machine that has nothing else to do
def test_batches_are_late_beside_what_holds_the_lock_and_no_other(pool: ThreadPoolExecutor) -> None:
    launched = laps_of(lambda size: spin(0.01), 10, 20)
    given: Any = {"every": 60, "at_once": 4}
    assert 0.02 < launched.beside(lambda _: pool.submit(spin, 0.03), **given)[1] < 0.06
    waited_for = laps_of(lambda size: time.sleep(0.01), 10, 20)
    results, late = waited_for.beside(lambda n: pool.submit(lambda: n), **given)
    assert results == [*range(len(results))]
    assert late < 0.01


@pytest.mark.slow  # of time that passes: for a machine that has nothing else to do
def test_work_is_begun_as_blocks_are_computed_and_waits_for_what_is_under_way(
    pool: ThreadPoolExecutor,
) -> None:
    begun: list[float] = []
    running, most = 0, 0

    def work() -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun.append(time.perf_counter())
        time.sleep(0.1)
        running -= 1
        return 0.1

    for at_once, between in ((4, 0.05), (1, 0.1)):
        begun.clear()
        most = 0
        some = laps_of(lambda size: time.sleep(0.01), 10)
        results, late = some.beside(lambda _: pool.submit(work), every=50, at_once=at_once)
        assert len(results) == len(begun) >= 5
        gaps = [later - earlier for earlier, later in pairwise(begun)]
        assert median(gaps) == pytest.approx(between, rel=0.3)
        assert most == (1 if at_once == 1 else 2)
        assert late < 0.02  # to wait for a place is not to be late


def test_a_slow_block_is_not_waited_for_once_its_work_is_done(pool: ThreadPoolExecutor) -> None:
    some = laps_of(lambda size: time.sleep(0.05), 10)
    results, _ = some.beside(lambda n: pool.submit(lambda: n), every=10_000, at_once=4)
    assert results == [0]


def test_what_fails_beside_batches_is_raised(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        laps_of(lambda size: spin(0.01), 10).beside(
            lambda _: pool.submit(fail), every=10, at_once=1
        )


def test_batches_that_were_slower_alone_by_chance_count_as_they_are_beside_work(
    clock: Clock,
) -> None:
    takes = 0.05
    some = laps_of(lambda size: clock.sleep(takes), 10)
    takes = 0.02
    done: Future[float] = Future()
    done.set_result(0.1)
    _, late = some.beside(lambda _: done, every=100, at_once=4)
    assert some.seconds_of([10] * 10) + late == pytest.approx(0.2)
