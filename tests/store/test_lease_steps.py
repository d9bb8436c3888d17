"""Leases step by step: each interleaving of two processes is laid out by hand."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.lease_holders import BLOCK, LONG_AGO, before_linking, dead_pid, fall_asleep, foreign

from embedcache.cache.format.layout import LEASES
from embedcache.errors import OutputError
from embedcache.store import lease as leases
from embedcache.store import writers as holder
from embedcache.store.lease import COORDINATOR, WRITERS, Leases, lease_name
from embedcache.store.writers import this_machine


def test_a_claim_that_was_dropped_while_it_was_read_is_not_taken_beside_its_next_owner(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick, third = (stack.enter_context(Leases(tmp_path)) for _ in range(3))
    assert quick.take(BLOCK)
    read = leases.read_writer

    def too_late(path: Path) -> Any:
        monkeypatch.setattr(leases, "read_writer", read)
        quick.release(BLOCK)
        found = read(path)
        before_linking(monkeypatch, lambda: owners.append(third.take(BLOCK)))
        return found

    owners: list[bool] = []
    monkeypatch.setattr(leases, "read_writer", too_late)
    owners.append(slow.take(BLOCK))
    assert owners == [True, False]
    assert third.holds(BLOCK)
    assert not slow.holds(BLOCK)


def test_one_that_saw_no_claim_is_refused_by_one_taken_over_since(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = (stack.enter_context(Leases(tmp_path)) for _ in range(2))

    def meanwhile() -> None:
        foreign(tmp_path, BLOCK, age=LONG_AGO)
        assert quick.take(BLOCK)  # generation 1: 0 is free again

    before_linking(monkeypatch, meanwhile)
    assert not slow.take(BLOCK)
    assert quick.holds(BLOCK)
    assert not slow.holds(BLOCK)


def test_a_dead_one_that_was_first_is_followed_at_once(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    before_linking(monkeypatch, lambda: foreign(tmp_path, BLOCK, age=LONG_AGO))
    assert taker.take(BLOCK)
    assert taker.holds(BLOCK)


def test_two_takers_of_an_expired_claim_at_the_same_step(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw it expired; either may link first, and the other is refused."""
    for quick_releases in (False, True):
        slow, quick = (stack.enter_context(Leases(tmp_path)) for _ in range(2))
        name = lease_name("train", 10 + quick_releases)
        foreign(tmp_path, name, age=LONG_AGO, attempt=f"dead{quick_releases}")

        def meanwhile(
            name: str = name, quick: Leases = quick, drops: bool = quick_releases
        ) -> None:
            assert quick.take(name)
            if drops:
                quick.release(name)

        before_linking(monkeypatch, meanwhile)
        assert slow.take(name) == quick_releases
        assert [slow.holds(name), quick.holds(name)] == [quick_releases, not quick_releases]


def test_who_slept_drops_nothing_of_its_followers(tmp_path: Path, stack: ExitStack) -> None:
    sleeper, second, third = (stack.enter_context(Leases(tmp_path)) for _ in range(3))
    assert sleeper.take(BLOCK)
    fall_asleep(sleeper)
    assert second.take(BLOCK)
    assert not sleeper.holds(BLOCK)
    with pytest.raises(OutputError, match=r"was taken over .* stood still .*type the same again"):
        sleeper.require(BLOCK)
    second.release(BLOCK)
    assert third.take(BLOCK)  # in a file of the very name that the sleeper's had
    sleeper.release(BLOCK)
    assert third.holds(BLOCK)
    third.require(BLOCK)


def test_of_two_generations_the_newest_holds(tmp_path: Path, stack: ExitStack) -> None:
    """A taker has linked, and has not yet removed what it follows."""
    first = stack.enter_context(Leases(tmp_path))
    assert first.take(BLOCK)
    foreign(tmp_path, BLOCK, age=0, generation=1)
    assert not first.holds(BLOCK)
    assert not first.take(BLOCK)


def test_a_damaged_claim_is_nobodys_and_expires(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    for text in ("", "[1]", '{"attempt": "f00"}'):
        path = foreign(tmp_path, BLOCK, age=0)
        path.write_text(text)
        assert not taker.take(BLOCK)
        assert taker.others()[0].host == "an unknown host"
        os.utime(path, (1, 1))
        assert taker.take(BLOCK)
        taker.release(BLOCK)
        shutil.rmtree(tmp_path / LEASES / WRITERS)


def test_a_process_of_another_machine_is_judged_by_its_age_alone(
    tmp_path: Path, stack: ExitStack
) -> None:
    taker, gone = stack.enter_context(Leases(tmp_path)), dead_pid()
    foreign(tmp_path, BLOCK, age=0, pid=gone)
    assert not taker.take(BLOCK)
    foreign(tmp_path, COORDINATOR, age=0, pid=gone, attempt="near", machine=this_machine())
    assert taker.take(COORDINATOR)


def test_a_clock_that_is_ahead_keeps_a_claim(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    foreign(tmp_path, BLOCK, age=-LONG_AGO)
    assert not taker.take(BLOCK)


def test_a_process_of_another_user_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert holder.is_running(1)


def test_containers_of_one_machine_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = this_machine()
    monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[another]"))
    assert this_machine() != mine


def test_a_swept_folder_is_made_again(tmp_path: Path, stack: ExitStack) -> None:
    taker = stack.enter_context(Leases(tmp_path))
    shutil.rmtree(tmp_path / LEASES)
    assert taker.take(BLOCK)
    assert taker.holds(BLOCK)


def test_a_folder_that_is_swept_while_a_process_begins_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = leases.publish_json

    def swept(path: Path, value: Any) -> None:
        monkeypatch.setattr(leases, "publish_json", publish)
        raise FileNotFoundError(errno.ENOENT, "swept", str(path))

    monkeypatch.setattr(leases, "publish_json", swept)
    with Leases(tmp_path) as begun:
        assert begun.take(BLOCK)


def test_a_heart_that_missed_a_beat_goes_on(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    beats, again, touch = [], threading.Event(), Leases._touch

    def failing(self: Leases) -> float:
        if threading.current_thread().name == "leases":
            beats.append(1)
            if len(beats) == 1:
                raise OSError(errno.EIO, "a network that is down")
            again.set()
        return touch(self)

    monkeypatch.setattr(Leases, "_touch", failing)
    stack.enter_context(Leases(tmp_path))
    assert again.wait(60)


def test_racing_threads_that_fall_asleep_never_own_at_once(tmp_path: Path) -> None:
    """Each owner may be taken for dead the moment that it has let go; none while it works."""
    guard, owner, wrong, wins = threading.Lock(), [""], [], []
    stop = threading.Event()
    foreign(tmp_path, BLOCK, age=LONG_AGO)

    def race(racer: Leases) -> None:
        while not stop.is_set():
            if not racer.take(BLOCK):
                continue
            with guard:
                if owner[0]:
                    wrong.append((owner[0], racer.attempt))
                owner[0] = racer.attempt
            with guard:
                owner[0] = ""
                wins.append(racer.attempt)
                if len(wins) >= 60:
                    stop.set()
                if len(wins) % 3:  # a third are left behind, and found expired
                    racer.release(BLOCK)
                else:
                    with suppress(FileNotFoundError):
                        abandon(tmp_path, racer)

    with ExitStack() as opened:
        racers = [opened.enter_context(Leases(tmp_path)) for _ in range(3)]
        threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(wins) >= 60


def abandon(cache: Path, racer: Leases) -> None:
    """Turn a racer's lease into one of a process that is dead for long, in one step."""
    path = racer._held.pop(BLOCK)
    dead = cache / LEASES / f"{racer.attempt}.dead"
    says = {"attempt": racer.attempt[::-1], "host": "far", "machine": "elsewhere", "pid": 1}
    dead.write_text(json.dumps(says | {"began": ""}))
    os.utime(dead, (1, 1))
    dead.replace(path)
