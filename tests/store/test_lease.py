"""Leases: one process at a time works on a part of a cache; leases of the dead are taken over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.lease_holders import BLOCK, LONG_AGO, dead_pid, fall_asleep, foreign

from embedcache.errors import OutputError
from embedcache.progress import SILENT, Silent
from embedcache.store import lease
from embedcache.store.lease import COORDINATOR, LEASES, Leases, this_machine, writers_of

HOLD = """
import sys, time
from pathlib import Path
from embedcache.store.lease import Leases
with Leases(Path(sys.argv[1])) as leases:
    print(leases.take(sys.argv[2]), flush=True)
    time.sleep(60)
"""


def test_a_lease_has_one_holder_until_it_is_released(tmp_path: Path, stack: ExitStack) -> None:
    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    assert first.take(BLOCK)
    assert first.take(BLOCK)
    assert not second.take(BLOCK)
    second.release(BLOCK)  # it does not hold it
    assert first.holds(BLOCK)
    found = json.loads((tmp_path / LEASES / f"{BLOCK}.json").read_text())
    assert (found["attempt"], found["pid"]) == (first.attempt, os.getpid())
    first.release(BLOCK)
    assert second.take(BLOCK)


def test_the_last_process_to_leave_removes_all_folders(tmp_path: Path) -> None:
    with Leases(tmp_path) as first:
        with Leases(tmp_path) as second:
            first.take(BLOCK)
            second.take(COORDINATOR)
            second.staging.mkdir(parents=True)
        assert first.holds(BLOCK)
        foreign(tmp_path, COORDINATOR, age=LONG_AGO)
    assert not list(tmp_path.iterdir())


def test_a_lease_expires_without_heartbeats(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    foreign(tmp_path, BLOCK, age=lease.EXPIRY_SECONDS - 20)
    assert not taker.take(BLOCK)
    assert [writer.attempt for writer in taker.others()] == ["f00"]
    foreign(tmp_path, COORDINATOR, age=lease.EXPIRY_SECONDS + 20, attempt="expired")
    assert taker.take(COORDINATOR)
    assert {writer.attempt for writer in writers_of(tmp_path)} == {taker.attempt, "f00"}


def test_age_is_measured_by_the_file_systems_clock(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    foreign(tmp_path, BLOCK, age=0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not taker.take(BLOCK)


def test_heartbeats_keep_a_lease(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    first.take(BLOCK)
    os.utime(first._file, (1, 1))
    deadline = time.monotonic() + 60
    while first._file.stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not second.take(BLOCK)


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), BLOCK]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        Leases(tmp_path) as taker,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert not taker.take(BLOCK)
        with pytest.raises(OutputError, match=rf"needs exclusive access.*process {process.pid} on"):
            taker.require_alone("`repair=`")
        process.kill()
        process.wait()
        assert taker.take(BLOCK)
        taker.require_alone("`repair=`")
    assert not list(tmp_path.iterdir())


def test_process_ids_of_another_machine_mean_nothing(tmp_path: Path, stack: ExitStack) -> None:
    taker, gone = stack.enter_context(Leases(tmp_path)), dead_pid()
    foreign(tmp_path, BLOCK, age=0, pid=gone)
    assert not taker.take(BLOCK)
    foreign(tmp_path, COORDINATOR, age=0, pid=gone, attempt="near", machine=this_machine())
    assert taker.take(COORDINATOR)


def test_a_damaged_lease_expires(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    path = foreign(tmp_path, BLOCK, age=0)
    path.write_text('{"attempt": "f00"}')
    assert not taker.take(BLOCK)
    assert taker.others()[0].host == "an unknown host"
    os.utime(path, (1, 1))
    assert taker.take(BLOCK)


def test_racing_threads_hold_a_lease_one_at_a_time(tmp_path: Path, stack: ExitStack) -> None:
    holders, most, guard = 0, 0, threading.Lock()
    foreign(tmp_path, BLOCK, age=LONG_AGO)

    def race(racer: Leases) -> None:
        nonlocal holders, most
        done = 0
        while done < 30:
            if racer.take(BLOCK):
                with guard:
                    holders += 1
                    most = max(most, holders)
                time.sleep(0.0002)
                with guard:
                    holders -= 1
                racer.release(BLOCK)
                done += 1

    racers = [stack.enter_context(Leases(tmp_path)) for _ in range(3)]
    threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_late_taker_leaves_the_lease_of_a_quicker_one(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find an expired lease; the quick one takes it over before the slow one removes it."""
    slow, quick = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    foreign(tmp_path, BLOCK, age=LONG_AGO)
    remove = Leases._remove_expired

    def late(self: Leases, *arguments: Any) -> None:
        monkeypatch.setattr(Leases, "_remove_expired", remove)
        assert quick.take(BLOCK)
        remove(self, *arguments)

    monkeypatch.setattr(Leases, "_remove_expired", late)
    assert not slow.take(BLOCK)
    assert quick.holds(BLOCK)


def test_a_process_that_slept_gives_nothing_up_but_its_own(
    tmp_path: Path, stack: ExitStack
) -> None:
    sleeper, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    assert sleeper.take(BLOCK)
    fall_asleep(sleeper)
    assert second.take(BLOCK)
    assert not sleeper.holds(BLOCK)
    with pytest.raises(OutputError, match=r"taken over .* did not renew its leases .*Run the same"):
        sleeper.require(BLOCK)
    sleeper.release(BLOCK)
    assert second.holds(BLOCK)


def test_a_process_whose_file_was_removed_is_refused(tmp_path: Path) -> None:
    with Leases(tmp_path) as sleeper:
        fall_asleep(sleeper)
        with Leases(tmp_path):
            pass  # the last to leave, as far as it sees
        with pytest.raises(OutputError, match="was taken over"):
            sleeper.take(BLOCK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "asleep", "staged", "translated"),
    [
        (OSError(errno.ENOTEMPTY, "x"), True, True, True),
        (ValueError("x"), True, False, True),
        (ValueError("x"), False, False, False),
        (OSError(errno.EIO, "x"), True, True, False),
        (KeyboardInterrupt(), True, False, False),
    ],
)
def test_errors_that_follow_from_sleep_say_so_and_others_pass(
    tmp_path: Path, error: BaseException, asleep: bool, staged: bool, translated: bool
) -> None:
    with pytest.raises(OutputError if translated else type(error)) as found, Leases(tmp_path) as me:
        if staged:
            me.staging.mkdir(parents=True)
            (me.staging / "block").touch()
        if asleep:
            fall_asleep(me)
        raise error
    assert (found.value.__cause__ if translated else found.value) is error


def test_waiting_for_the_coordinator_is_reported_once(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    said: list[str] = []
    polls: list[float] = []

    class Listener(Silent):
        def say(self, remark: str) -> None:
            said.append(remark)

    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    coordinating = ExitStack()
    coordinating.enter_context(first.coordinating(SILENT))

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            coordinating.close()

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with second.coordinating(Listener()):
        assert second.holds(COORDINATOR)
    assert not second.holds(COORDINATOR)
    assert said == [f"waiting for {writers_of(tmp_path)[0]} to prepare or finish the cache"]


def test_a_full_disk_hides_no_other_error_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease, "publish_json", full)
        with pytest.raises(OSError, match="No space"):
            Leases(tmp_path / "cache").__enter__()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache"]
    with pytest.raises(ValueError, match="the first"), Leases(tmp_path) as held:
        held.take(BLOCK)
        monkeypatch.setattr(os, "utime", full)
        raise ValueError("the first")
