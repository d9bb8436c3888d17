"""Leases of others, and moments between the steps of a taker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcache.cache.format.layout import LEASES
from embedcache.store import lease as leases
from embedcache.store.lease import WRITERS, Leases, lease_name

BLOCK = lease_name("train", 3)
LONG_AGO = 1000.0


def dead_pid() -> int:
    """Return the number of a process that is gone."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def foreign(
    cache: Path, name: str, *, age: float, generation: int = 0, attempt: str = "f00", **says: Any
) -> Path:
    """Leave a lease of a process on another machine that beat so long ago; return its file."""
    writer = cache / LEASES / WRITERS / f"{attempt}.json"
    writer.parent.mkdir(parents=True, exist_ok=True)
    said = {"attempt": attempt, "host": "far", "machine": "elsewhere", "pid": 1, "began": ""}
    writer.write_text(json.dumps(said | says))
    target = cache / LEASES / f"{name}.{generation}.json"
    target.parent.mkdir(exist_ok=True)
    target.hardlink_to(writer)
    os.utime(writer, (time.time() - age,) * 2)
    return target


def fall_asleep(sleeper: Leases) -> None:
    """Let a process stand still for longer than its leases last."""
    sleeper._closed.set()  # its heart stops
    sleeper._thread.join()
    os.utime(sleeper._mine, (1, 1))


def before_linking(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have ``act`` done once, before the next lease's file is linked."""
    link = leases.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(leases, "link", link)
        act()
        link(source, target)

    monkeypatch.setattr(leases, "link", late)
