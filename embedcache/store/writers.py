"""A process that writes a cache: what its file says, and whether it runs."""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that writes: what its file says. ``machine`` tells apart hosts of one name."""

    attempt: str
    host: str
    machine: str
    pid: int
    began: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_writer(path: Path) -> tuple[Writer, float] | None:
    """Return who keeps a file alive and when it was touched; None where it is gone.

    It is opened before it is asked for its time: a network file system may else answer from what
    it remembers.
    """
    try:
        with path.open() as file:
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return Writer(**json.loads(text)), touched
    except (ValueError, TypeError):  # damaged: nobody's, until it expires
        return Writer(attempt="", host="an unknown host", machine="", pid=0, began=""), touched


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def this_machine() -> str:
    """Return what tells this running system, and its numbering of processes, from any other."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {uuid.getnode():x}"
