"""Work on a cache is claimed by one process at a time, and taken over from the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.lease_holders import BLOCK, foreign

from embedcache.cache.format.layout import LEASES
from embedcache.errors import OutputError
from embedcache.progress import SILENT, Silent
from embedcache.store import lease as leases
from embedcache.store.lease import COORDINATOR, Leases, lease_name

HOLD = """
import sys, time
from pathlib import Path
from embedcache.store.lease import Leases
with Leases(Path(sys.argv[1])) as leases:
    print(leases.take(sys.argv[2]), flush=True)
    time.sleep(60)
"""
RACE = """
import sys
from pathlib import Path
from embedcache.store.lease import Leases
with Leases(Path(sys.argv[1])) as leases:
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(leases.take(f"train/{block:08d}") for block in range(40)), flush=True)
    sys.stdin.readline()
"""


def start(script: str, cache: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(cache), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def told(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_one_has_it_until_it_gives_it_up(tmp_path: Path, stack: ExitStack) -> None:
    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    assert first.take(BLOCK)
    assert first.take(BLOCK)
    assert not second.take(BLOCK)
    assert second.take(lease_name("train", 4))
    second.release(BLOCK)  # not its own
    assert first.holds(BLOCK)
    first.release(BLOCK)
    assert second.take(BLOCK)


def test_a_claim_names_its_holder(tmp_path: Path) -> None:
    with Leases(tmp_path) as held:
        held.take(BLOCK)
        found = json.loads((tmp_path / LEASES / "train/00000003.0.json").read_text())
    assert found["pid"] == os.getpid()
    assert found["attempt"] == held.attempt
    assert found["host"]
    assert found["began"]


def test_nothing_is_left_when_the_last_has_gone(tmp_path: Path) -> None:
    with Leases(tmp_path) as first:
        with Leases(tmp_path) as second:
            first.take(BLOCK)
            second.take(COORDINATOR)
        assert first.holds(BLOCK)
    assert not list(tmp_path.iterdir())


def test_a_claim_expires_without_a_heartbeat(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    foreign(tmp_path, BLOCK, age=leases.EXPIRY_SECONDS - 20)
    assert not taker.take(BLOCK)
    assert [holder.attempt for holder in taker.others()] == ["f00"]
    foreign(tmp_path, COORDINATOR, age=leases.EXPIRY_SECONDS + 20)
    assert taker.others() == []
    assert taker.take(COORDINATOR)
    assert [path.name for path in (tmp_path / LEASES).glob("turn.*")] == ["turn.1.json"]


def test_age_is_judged_by_the_file_systems_clock(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    foreign(tmp_path, BLOCK, age=0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not taker.take(BLOCK)


def test_the_heartbeat_keeps_a_claim(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 0.5)
    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    first.take(BLOCK)
    deadline = time.monotonic() + 1.2
    while time.monotonic() < deadline:
        assert not second.take(BLOCK)
        time.sleep(0.05)
    first._closed.set()  # its heart stops
    time.sleep(0.7)
    assert second.take(BLOCK)
    assert not first.holds(BLOCK)
    first.release(BLOCK)
    assert second.holds(BLOCK)


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path, BLOCK)
    assert said(process) == "True"
    with Leases(tmp_path) as taker:
        assert not taker.take(BLOCK)
        with pytest.raises(OutputError, match=rf"needs .* alone.*process {process.pid} on"):
            taker.require_alone("--repair")
        process.kill()
        process.communicate()
        assert taker.take(BLOCK)
        taker.require_alone("--repair")
    assert not list(tmp_path.iterdir())


def test_of_racing_processes_one_takes_over(tmp_path: Path) -> None:
    for block in range(0, 40, 2):
        foreign(tmp_path, lease_name("train", block), age=0)
        (tmp_path / LEASES / "writers/f00.json").unlink()
    for path in (tmp_path / LEASES / "train").iterdir():
        os.utime(path, (1, 1))
    racers = [start(RACE, tmp_path) for _ in range(4)]
    assert [said(racer) for racer in racers] == ["ready"] * 4
    for racer in racers:
        told(racer)
    won = [int(said(racer)) for racer in racers]
    for racer in racers:
        racer.communicate("\n")
    assert sum(won) == 40


def test_of_racing_threads_one_at_a_time_is_the_owner(tmp_path: Path, stack: ExitStack) -> None:
    """Leases are made, dropped and taken over on the way, so that generations come and go."""
    owners, most, rounds = 0, 0, []
    guard = threading.Lock()
    foreign(tmp_path, BLOCK, age=1000)

    def race(racer: Leases) -> None:
        nonlocal owners, most
        done = 0
        while done < 40:
            if racer.take(BLOCK):
                with guard:
                    owners += 1
                    most = max(most, owners)
                time.sleep(0.0002)
                with guard:
                    owners -= 1
                racer.release(BLOCK)
                done += 1
        rounds.append(done)

    racers = [stack.enter_context(Leases(tmp_path)) for _ in range(3)]
    threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rounds == [40] * 3
    assert most == 1


def test_a_taker_that_looked_long_ago_is_refused(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw an expired lease; since then that was taken over, given up, and claimed anew."""
    slow, quick, third = (stack.enter_context(Leases(tmp_path)) for _ in range(3))
    foreign(tmp_path, BLOCK, age=1000)
    link = leases.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(leases, "link", link)
        assert quick.take(BLOCK)
        quick.release(BLOCK)
        assert third.take(BLOCK)
        link(source, target)

    monkeypatch.setattr(leases, "link", late)
    assert not slow.take(BLOCK)
    assert third.holds(BLOCK)


def test_turns_are_waited_for_with_a_word(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
    heard: list[str] = []

    class Ear(Silent):
        def say(self, remark: str) -> None:
            heard.append(remark)
            first_turn.close()

    first, second = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
    first_turn = ExitStack()
    first_turn.enter_context(first.turn(SILENT))
    with second.turn(Ear()):
        assert not first.holds(COORDINATOR)
    assert len(heard) == 1
    assert heard[0].startswith(f"waiting for process {os.getpid()} on ")
