"""Leases: which process works on which part of a folder that several processes write.

Every process keeps one file under ``leases/writers`` and touches it while it lives. A lease is a
hard link to that file, created exclusively, so one touch keeps all leases of a process alive. A
lease whose file was not touched for `EXPIRY_SECONDS` has expired, and any process may take it over.
Age is measured by the file system's clock, because the clocks of machines differ.

Leases spare work and keep processes out of each other's way. They are no proof of exclusiveness:
where two processes compute one block, its commit marker decides (`embedcache.cache.blocks.commit`),
and a process that publishes for all calls `Leases.require` first.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from embedcache.errors import OutputError
from embedcache.progress import Progress
from embedcache.store.files import STAGING, publish_json

LEASES = "leases"
WRITERS = "writers"
COORDINATOR = "coordinator"
"""The lease on work that one process does for all: tokens, base, calibration, manifest."""
EXPIRY_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1.0
"""A wait that takes longer is reported."""
_CLEARED = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
"""Errors that a process meets when others have cleared or replaced its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that writes, as its file describes it.

    ``machine`` identifies the running system; two hosts may have one name.
    """

    attempt: str
    host: str
    machine: str
    pid: int
    began: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self, age: float) -> bool:
        """Whether the process lives; ``age``: seconds since it touched its file."""
        if self.machine == this_machine() and not is_running(self.pid):
            return False
        return age <= EXPIRY_SECONDS


class Leases:
    """The leases of this process on one folder, kept alive by a thread while the context is open.

    Attributes:
        attempt: an id of this process's run, hex.
        staging: the folder in which this run makes files before they are published; not made here.
    """

    def __init__(self, root: Path):
        self.attempt = uuid.uuid4().hex
        self.staging = root / STAGING / self.attempt
        self._root = root
        self._folder = root / LEASES
        self._file = self._folder / WRITERS / f"{self.attempt}.json"
        self._expired = False
        self._held: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        writer = Writer(
            attempt=self.attempt,
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            publish_json(self._file, asdict(writer))
        except OSError:
            self._remove_empty_folders()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Release all leases.

        Raises ``OutputError`` in place of an error that follows from having been taken over: this
        process stood still until its leases expired, and others cleared its files away.
        """
        self._closed.set()
        self._thread.join()
        cleared = not self.staging.is_dir()
        with suppress(OSError, OutputError):  # on a full disk the leases are left to expire
            self._leave()
        cleared |= isinstance(error, OSError) and error.errno in _CLEARED
        if isinstance(error, Exception) and self._expired and cleared:
            raise taken_over(self._root) from error

    def _leave(self) -> None:
        try:
            now = self._touch()
            for name in list(self._held):
                self.release(name)
            self._file.unlink(missing_ok=True)  # first: the last of several to leave sees no other
            if not live_writers(self._root, now):
                self._remove_dead(now)
        finally:
            self._remove_empty_folders()

    def _remove_dead(self, now: float) -> None:
        files = (Path(at) / name for at, _, names in os.walk(self._folder) for name in names)
        for path in list(files):
            found = read_writer(path)
            if found is not None and not found[0].is_alive(now - found[1]):
                path.unlink(missing_ok=True)

    def _remove_empty_folders(self) -> None:
        for folder in (*self._folder.glob("*/"), self._folder, self.staging, self.staging.parent):
            with suppress(OSError):  # not empty: in use
                folder.rmdir()

    def take(self, name: str) -> bool:
        """Take the lease ``name``, such as ``train/00000003``; False if a live process has it.

        Raises ``OutputError`` where this process was itself taken over.
        """
        path = self._path(name)
        while True:
            now = self._touch()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._file, path)
            except FileExistsError:
                pass
            except FileNotFoundError:  # the last process to leave removed the folder
                continue
            else:
                self._held.add(name)
                return True
            found = read_writer(path)
            if found is None:
                continue  # released just now
            if found[0].attempt == self.attempt:
                return True
            if found[0].is_alive(now - found[1]):
                return False
            self._remove_expired(path, found[0])

    def _remove_expired(self, path: Path, writer: Writer) -> None:
        """Remove the lease of a dead writer; a lease that another has taken meanwhile is kept."""
        removed = path.with_name(f".{path.name}.{self.attempt}")
        with suppress(FileNotFoundError):
            path.rename(removed)
            found = read_writer(removed)
            if found is not None and found[0].attempt != writer.attempt:
                with suppress(FileExistsError):
                    os.link(removed, path)
            removed.unlink()

    def holds(self, name: str) -> bool:
        """Whether this process still has the lease: it may have slept until that expired."""
        found = read_writer(self._path(name))
        return found is not None and found[0].attempt == self.attempt

    def require(self, name: str) -> None:
        """Raise ``OutputError`` unless this process still has the lease."""
        if not self.holds(name):
            raise taken_over(self._root)

    def release(self, name: str) -> None:
        """Give a lease up; nothing happens if it is not held."""
        self._held.discard(name)
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)

    def others(self) -> list[Writer]:
        """Return the other live processes that write here."""
        found = live_writers(self._root, self._touch())
        return [writer for writer in found if writer.attempt != self.attempt]

    def require_alone(self, what: str) -> None:
        """Raise ``OutputError`` if another process writes here; ``what`` needs that none does."""
        if others := self.others():
            raise OutputError(
                f"{what} needs {self._root} alone, but {', '.join(map(str, others))} is writing "
                "it: wait for that process or stop it, then run the same call again. (A process "
                f"that was killed on another machine counts as alive for {EXPIRY_SECONDS:.0f} s.)"
            )

    @contextmanager
    def coordinating(self, progress: Progress) -> Iterator[None]:
        """Hold `COORDINATOR` in the context, after waiting for the process that holds it."""
        started, reported = time.monotonic(), ""
        while not self.take(COORDINATOR):
            found = read_writer(self._path(COORDINATOR))
            waited = time.monotonic() - started > PATIENCE_SECONDS
            if waited and found is not None and found[0].attempt != reported:
                reported = found[0].attempt
                progress.say(f"waiting for {found[0]}, which prepares or finishes the cache")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self.release(COORDINATOR)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _touch(self) -> float:
        """Touch this process's file; return the file system's time of that."""
        try:
            before = self._file.stat().st_mtime
            os.utime(self._file)
            now = self._file.stat().st_mtime
        except FileNotFoundError as error:
            self._expired = True
            raise taken_over(self._root) from error
        self._expired |= now - before > EXPIRY_SECONDS
        return now

    def _keep_alive(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, OutputError):  # the next heartbeat makes up for a missed one
                self._touch()


def taken_over(root: Path) -> OutputError:
    """Return the error of a process whose leases expired and whose work others do now."""
    return OutputError(
        f"{root} was taken over by another process while this one stood still for more than "
        f"{EXPIRY_SECONDS:.0f} s: run the same call again to join it"
    )


def writers_of(root: Path) -> list[Writer]:
    """Return the live processes that write a folder; for a reader, which touches nothing.

    The age of a process of another machine is measured by this machine's clock.
    """
    return live_writers(root, time.time())


def live_writers(root: Path, now: float) -> list[Writer]:
    """Return the live processes that write a folder; ``now``: seconds since the epoch."""
    files: list[Path] = []
    with suppress(FileNotFoundError):  # the last process to leave removes the folder
        files = sorted((root / LEASES / WRITERS).glob("*.json"))
    found = [entry for path in files if (entry := read_writer(path)) is not None]
    return [writer for writer, touched in found if writer.is_alive(now - touched)]


def read_writer(path: Path) -> tuple[Writer, float] | None:
    """Return the writer in a file and the time at which it touched the file; None if it is gone.

    The file is opened before its time is read: a network file system may else answer from a cache.
    """
    try:
        with path.open() as file:
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return Writer(**json.loads(text)), touched
    except (ValueError, TypeError):  # damaged: it counts as alive until it expires
        return Writer(attempt="", host="an unknown host", machine="", pid=0, began=""), touched


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def this_machine() -> str:
    """Return an id of this running system and its process namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {uuid.getnode():x}"


def lease_name(split: str, block: int) -> str:
    """Return the name of the lease on a block.

    >>> lease_name("train", 3)
    'train/00000003'
    """
    return f"{split}/{block:08d}"
