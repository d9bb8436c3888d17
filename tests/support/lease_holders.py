"""Leases of other processes: on other machines, dead, or asleep."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from embedcache.store.lease import LEASES, WRITERS, Leases, lease_name

BLOCK = lease_name("train", 3)
LONG_AGO = 1000.0


def dead_pid() -> int:
    """Return the id of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def foreign(cache: Path, name: str, *, age: float, attempt: str = "f00", **fields: Any) -> Path:
    """Make a lease of a process on another machine, touched ``age`` seconds ago; return its file.

    ``fields`` replace those of its `Writer`.
    """
    writer = cache / LEASES / WRITERS / f"{attempt}.json"
    writer.parent.mkdir(parents=True, exist_ok=True)
    values = {"attempt": attempt, "host": "far", "machine": "elsewhere", "pid": 1, "began": ""}
    writer.write_text(json.dumps(values | fields))
    target = cache / LEASES / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.hardlink_to(writer)
    os.utime(writer, (time.time() - age,) * 2)
    return target


def fall_asleep(sleeper: Leases) -> None:
    """Let a process stand still until its leases have expired."""
    sleeper._closed.set()
    sleeper._thread.join()
    os.utime(sleeper._file, (1, 1))
