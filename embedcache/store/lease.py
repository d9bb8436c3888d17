"""Leases: which of the processes that write a cache is at work on what.

Every process keeps one file under ``leases/writers``, and touches it while it lives. A lease is a
hard link to that file, made exclusively, so one touch keeps all of a process's leases alive. Age is
judged by the file system's own clock, as machines disagree. A lease that nobody keeps alive is
taken over by its next generation, as a marker is repaired: of several takers one makes the link.

Leases only spare work. Where two processes do compute one block, its marker decides (see
`embedcache.cache.blocks.commit`).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from os import link
from pathlib import Path

from embedcache.cache.format.layout import LEASES, STAGING
from embedcache.errors import OutputError
from embedcache.progress import Progress
from embedcache.store.files import publish_json
from embedcache.store.writers import Writer, is_running, read_writer, this_machine

WRITERS = "writers"
COORDINATOR = "turn"
"""The lease on what one process does for all: pass 0, the base, the calibration, the manifest."""
EXPIRY_SECONDS = 60.0
BEAT_SECONDS = 10.0
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1.0
"""A wait is told of when it has taken so long."""
_SWEPT_AWAY = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
"""What a process runs into where others, taking it for dead, cleared up after it."""


class Leases:
    """The leases of this process on one cache, kept alive by a thread while the context is open."""

    def __init__(self, cache: Path):
        self.attempt = uuid.uuid4().hex
        self.staging = cache / STAGING / self.attempt
        self._folder = cache / LEASES
        self._mine = self._folder / WRITERS / f"{self.attempt}.json"
        self._me = Writer(
            attempt=self.attempt,
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._held: dict[str, Path] = {}
        self._made = self._lapsed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        try:
            self._beat()
        except OSError:
            self._remove_folders()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Give up all leases; raises ``OutputError`` for what comes of having been taken for dead.

        A process that stood still past its expiry may find gone, or another, what it had begun.
        """
        self._closed.set()
        self._thread.join()
        cleared = not self.staging.is_dir()
        with suppress(OSError):  # a disk that takes nothing more: what is left here expires
            self._leave()
        swept = isinstance(error, OSError) and error.errno in _SWEPT_AWAY
        if isinstance(error, Exception) and self._lapsed and (cleared or swept):
            raise taken_over(self._folder.parent) from error

    def _leave(self) -> None:
        now = self._beat()
        for name in list(self._held):
            self.release(name)
        self._mine.unlink(missing_ok=True)  # first: of several that leave, the last sees nobody
        if not self._others(now):
            self._sweep(now)

    def take(self, name: str) -> bool:
        """Claim ``name``, such as ``train/00000003``; False where another live process has it."""
        while True:
            found = self._generations(name)
            newest = max(found, default=-1)
            last = read_writer(found[newest]) if found else None
            if last is not None and last[0].attempt == self.attempt:
                return True
            if last is not None and self._alive(*last, self._beat()):
                return False
            if found and last is None:
                continue  # released just now
            path = self._path(name, newest + 1)
            if not self._link(path):
                continue  # another was first
            # Whoever looked long ago may link a generation that has come and gone since: a lease
            # holds if it is the newest, and follows the very lease that was found expired.
            found = self._generations(name)
            follows = last is None or self._attempt(found.get(newest)) == last[0].attempt
            if max(found, default=-1) == newest + 1 and follows:
                for generation in sorted(found)[:-1]:
                    found[generation].unlink(missing_ok=True)
                self._held[name] = path
                return True
            path.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether this process has the lease still: it may have slept past its expiry."""
        found = self._generations(name)
        return bool(found) and self._attempt(found[max(found)]) == self.attempt

    def require(self, name: str) -> None:
        """Raise ``OutputError`` unless this process has the lease still."""
        if not self.holds(name):
            raise taken_over(self._folder.parent)

    def release(self, name: str) -> None:
        """Give up a lease; no harm where it is not held."""
        path = self._held.pop(name, None)
        if path is not None and self._attempt(path) == self.attempt:
            path.unlink(missing_ok=True)

    def others(self) -> list[Writer]:
        """Return the other live processes that write here."""
        return self._others(self._beat())

    def _others(self, now: float) -> list[Writer]:
        files = (self._folder / WRITERS).glob("*.json")
        found = [read_writer(path) for path in files if path.name != self._mine.name]
        return [entry[0] for entry in found if entry is not None and self._alive(*entry, now)]

    def require_alone(self, what: str) -> None:
        """Raise ``OutputError`` where another process writes here."""
        if others := self.others():
            raise OutputError(
                f"{what} needs {self._folder.parent} alone, and it is being written by "
                f"{', '.join(map(str, others))}: wait for it, or stop it (a process that was "
                f"killed on another machine counts for {EXPIRY_SECONDS:.0f} s) and type the same "
                "again"
            )

    @contextmanager
    def coordinating(self, progress: Progress) -> Iterator[None]:
        """Hold what only one process at a time may do, after waiting for whoever is at it."""
        started, told = time.monotonic(), ""
        while not self.take(COORDINATOR):
            holder = self._holder(COORDINATOR)
            waited = time.monotonic() - started > PATIENCE_SECONDS
            if waited and holder is not None and holder.attempt != told:
                told = holder.attempt
                progress.say(f"waiting for {holder}, which prepares or finishes the cache")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self.release(COORDINATOR)

    def _holder(self, name: str) -> Writer | None:
        found = self._generations(name)
        entry = read_writer(found[max(found)]) if found else None
        return None if entry is None else entry[0]

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f"{name}.{generation}.json"

    def _generations(self, name: str) -> dict[int, Path]:
        place = self._folder / name
        pattern = re.compile(re.escape(place.name) + r"\.(\d+)\.json")
        try:
            names = [path.name for path in place.parent.iterdir()]
        except FileNotFoundError:
            return {}
        return {
            int(match[1]): place.parent / found
            for found in names
            if (match := pattern.fullmatch(found))
        }

    def _link(self, path: Path) -> bool:
        """Make a lease's file; False where it is there already."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            link(self._mine, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the last to leave swept a folder away
            self._beat()
            return False
        return True

    def _attempt(self, path: Path | None) -> str | None:
        entry = None if path is None else read_writer(path)
        return None if entry is None else entry[0].attempt

    def _alive(self, holder: Writer, touched: float, now: float) -> bool:
        if holder.machine == self._me.machine and not is_running(holder.pid):
            return False
        return now - touched <= EXPIRY_SECONDS

    def _beat(self) -> float:
        """Touch this process's file, made if it is not there; return the time that it got."""
        while True:
            try:
                return self._touch()
            except FileNotFoundError:
                self._lapsed |= self._made
                with suppress(FileNotFoundError):  # the last to leave swept the folder away
                    publish_json(self._mine, asdict(self._me))
                    self._made = True

    def _touch(self) -> float:
        before = self._mine.stat().st_mtime
        os.utime(self._mine)
        now = self._mine.stat().st_mtime
        self._lapsed |= now - before > EXPIRY_SECONDS
        return now

    def _keep_alive(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with suppress(OSError):  # a beat that is missed may be made up for by the next
                self._touch()

    def _sweep(self, now: float) -> None:
        """Remove what dead processes left, and the folders that are empty then."""
        files = (Path(at) / name for at, _, names in os.walk(self._folder) for name in names)
        for path in list(files):
            entry = read_writer(path)
            if entry is not None and not self._alive(*entry, now):
                path.unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        tops = (self._folder, self.staging, self.staging.parent)
        for folder in (*self._folder.glob("*/"), *tops):
            with suppress(OSError):  # not empty: in use
                folder.rmdir()


def taken_over(cache: Path) -> OutputError:
    """Return the error of a process that others took for dead, and whose work they do now."""
    return OutputError(
        f"{cache} was taken over by another process while this one stood still for more than "
        f"{EXPIRY_SECONDS:.0f} s: type the same again to join it"
    )


def writers_of(cache: Path) -> list[Writer]:
    """Return the processes that write a cache, for one who only looks and touches nothing.

    Age is judged by this machine's clock, and not at all for a process of this machine.
    """
    mine, now = this_machine(), time.time()
    files: list[Path] = []
    with suppress(FileNotFoundError):  # the last one takes the folder along, at any moment
        files = sorted((cache / LEASES / WRITERS).glob("*.json"))
    found = [entry for path in files if (entry := read_writer(path)) is not None]
    return [
        holder
        for holder, touched in found
        if (is_running(holder.pid) if holder.machine == mine else now - touched <= EXPIRY_SECONDS)
    ]


def lease_name(split: str, block: int) -> str:
    """Return the name of the lease on a block.

    >>> lease_name("train", 3)
    'train/00000003'
    """
    return f"{split}/{block:08d}"
