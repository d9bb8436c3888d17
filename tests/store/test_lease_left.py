"""What those who lease leave behind, wait for, run into and see of each other."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.lease_holders import BLOCK, LONG_AGO, dead_pid, fall_asleep, foreign

from embedcache.cache.format.layout import LEASES
from embedcache.errors import OutputError
from embedcache.progress import SILENT, Silent
from embedcache.store import lease as leases
from embedcache.store.lease import COORDINATOR, Leases, writers_of
from embedcache.store.writers import this_machine


def test_who_leaves_others_alive_touches_nothing_of_the_dead(
    tmp_path: Path, stack: ExitStack
) -> None:
    stack.enter_context(Leases(tmp_path))
    left = foreign(tmp_path, BLOCK, age=LONG_AGO)
    with Leases(tmp_path):
        pass
    assert left.exists()


def test_who_leaves_last_sweeps_nothing_of_one_that_just_came(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    comer = Leases(tmp_path)
    others = Leases._others

    def before_the_sweep(self: Leases, now: float) -> Any:
        monkeypatch.setattr(Leases, "_others", others)
        found = others(self, now)
        stack.enter_context(comer)
        assert comer.take(BLOCK)
        return found

    monkeypatch.setattr(Leases, "_others", before_the_sweep)
    with Leases(tmp_path):
        pass
    assert comer.holds(BLOCK)
    assert comer._mine.exists()


def test_an_empty_staging_folder_goes_and_a_full_one_stays(tmp_path: Path) -> None:
    with Leases(tmp_path) as held:
        held.staging.mkdir(parents=True)
    assert not list(tmp_path.iterdir())
    with Leases(tmp_path) as held:
        held.staging.mkdir(parents=True)
        (held.staging / "block").touch()
    assert [path.name for path in tmp_path.iterdir()] == [".staging"]


def test_a_wait_tells_each_holder_once_and_only_after_a_moment(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    clock, polls = [0.0], 0

    class Ear(Silent):
        def say(self, remark: str) -> None:
            heard.append(remark)

    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    assert first.take(COORDINATOR)

    def slept(seconds: float) -> None:
        nonlocal polls
        polls += 1
        clock[0] = {1: 0.5, 2: 2.0, 3: 3.0, 4: 4.0}.get(polls, 5.0)
        assert len(heard) == (polls > 2)  # told once, after the sleep until 2.0
        if polls == 5:
            (tmp_path / LEASES / f"{COORDINATOR}.0.json").unlink()

    monkeypatch.setattr(leases.time, "sleep", slept)
    monkeypatch.setattr(leases.time, "monotonic", lambda: clock[0])
    with second.turn(Ear()):
        assert second.holds(COORDINATOR)
    assert not second.holds(COORDINATOR)
    assert len(heard) == 1
    assert polls == 5


def test_a_turn_that_is_given_up_as_it_is_asked_for_is_no_ones(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the wait has begun the holder leaves between two looks: there is nobody to name."""
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", -1.0)
    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    assert first.take(COORDINATOR)
    take = Leases.take

    def missed(self: Leases, name: str) -> bool:
        monkeypatch.setattr(Leases, "take", take)
        first.release(COORDINATOR)
        return False

    monkeypatch.setattr(Leases, "take", missed)
    with second.turn(SILENT):
        assert second.holds(COORDINATOR)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST])
@pytest.mark.parametrize("swept", [False, True])
def test_what_a_sleeper_runs_into_is_told_as_what_it_is(
    tmp_path: Path, code: int, swept: bool
) -> None:
    with (
        pytest.raises(OutputError, match="was taken over by another process") as told,
        Leases(tmp_path) as sleeper,
    ):
        fall_asleep(sleeper)
        if swept:
            sleeper._mine.unlink()
        raise OSError(code, os.strerror(code))
    assert isinstance(told.value.__cause__, OSError)


def test_whatever_comes_of_staging_that_others_cleared_away_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="was taken over"), Leases(tmp_path) as sleeper:
        fall_asleep(sleeper)
        raise ValueError("no such numbers")
    with pytest.raises(ValueError, match="no such numbers"), Leases(tmp_path):
        raise ValueError("no such numbers")
    with pytest.raises(KeyboardInterrupt), Leases(tmp_path) as sleeper:
        fall_asleep(sleeper)
        raise KeyboardInterrupt


@pytest.mark.parametrize("slept", [False, True])
def test_any_other_failure_stays_what_it_is(tmp_path: Path, slept: bool) -> None:
    error = OSError(errno.EIO if slept else errno.ENOENT, "of another kind")
    with pytest.raises(OSError, match="of another kind"), Leases(tmp_path) as held:
        held.staging.mkdir(parents=True)
        if slept:
            fall_asleep(held)
        raise error


def test_a_disk_that_takes_nothing_hides_no_failure_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "publish_json", full)
        with pytest.raises(OSError, match="No space"):
            Leases(tmp_path / "cache").__enter__()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache"]
    with pytest.raises(ValueError, match="the first"), Leases(tmp_path) as held:
        held.take(BLOCK)
        monkeypatch.setattr(os, "utime", full)
        raise ValueError("the first")


def test_one_who_only_looks_sees_who_writes(tmp_path: Path) -> None:
    assert writers_of(tmp_path) == []
    with Leases(tmp_path) as writing:
        fall_asleep(writing)  # of this machine: it may wake up
        foreign(tmp_path, BLOCK, age=0, attempt="far")
        foreign(tmp_path, BLOCK, age=LONG_AGO, attempt="expired", generation=1)
        gone = {"pid": dead_pid(), "machine": this_machine()}
        foreign(tmp_path, BLOCK, age=0, attempt="dead", generation=2, **gone)
        found = {writer.attempt for writer in writers_of(tmp_path)}
        assert found == {writing.attempt, "far"}
