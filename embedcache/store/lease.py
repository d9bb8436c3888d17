"""Leases divide the work on a folder among several processes that write to it.

Every process keeps one file under ``leases/writers`` and touches it regularly. A lease is a hard
link to that file, created exclusively, so one touch renews all leases of a process. A lease whose
file was not touched for `EXPIRY_SECONDS` has expired, and any process may take it over. Age is
measured by the file system's clock, because the clocks of machines differ.

Leases avoid duplicate work. They do not guarantee mutual exclusion: two processes may compute the
same block, and its commit marker then decides which result counts
(`embedcache.cache.blocks.commit`). A process calls `Leases.require` before it publishes a file that
all processes share.
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
"""The lease on work done once per cache: tokens, base, calibration, manifest."""
EXPIRY_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1.0
"""Waits longer than this are reported to the user."""
_REMOVED_ERRNOS = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
"""Error numbers that occur when another process has removed or replaced this process's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that writes to the folder: the contents of its file under ``leases/writers``.

    ``attempt`` identifies the run. ``machine`` identifies the running system, because two hosts may
    have the same name. ``began`` is the start time in ISO 8601, UTC.
    """

    attempt: str
    host: str
    machine: str
    pid: int
    began: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self, age: float) -> bool:
        """Whether the process is alive; ``age`` is the seconds since it touched its file."""
        if self.machine == this_machine() and not is_running(self.pid):
            return False
        return age <= EXPIRY_SECONDS


class Leases:
    """The leases of this process on one folder, kept alive by a thread while the context is open.

    Attributes:
        attempt: the id of this run, in hexadecimal.
        staging: the folder for this run's unpublished files. `Leases` does not create it.
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

        Raises ``OutputError`` from ``error`` if ``error`` is the consequence of a takeover: the
        leases of this process expired and another process removed its files.
        """
        self._closed.set()
        self._thread.join()
        files_removed = not self.staging.is_dir()
        with suppress(OSError, OutputError):  # for example a full disk: the leases will expire
            self._leave()
        files_removed |= isinstance(error, OSError) and error.errno in _REMOVED_ERRNOS
        if isinstance(error, Exception) and self._expired and files_removed:
            raise taken_over(self._root) from error

    def _leave(self) -> None:
        try:
            now = self._touch()
            for name in list(self._held):
                self.release(name)
            # Remove this file before looking for others. If several processes exit at once, the
            # last one then finds no other and cleans up.
            self._file.unlink(missing_ok=True)
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
            with suppress(OSError):  # still in use, so not empty
                folder.rmdir()

    def take(self, name: str) -> bool:
        """Take the lease ``name``, such as ``train/00000003``; False if a live process holds it.

        Raises ``OutputError`` if another process has taken over from this one.
        """
        path = self._path(name)
        while True:
            now = self._touch()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._file, path)
            except FileExistsError:
                pass
            except FileNotFoundError:  # another process removed the empty folder
                continue
            else:
                self._held.add(name)
                return True
            found = read_writer(path)
            if found is None:
                continue  # released in the meantime
            if found[0].attempt == self.attempt:
                return True
            if found[0].is_alive(now - found[1]):
                return False
            self._remove_expired(path, found[0])

    def _remove_expired(self, path: Path, writer: Writer) -> None:
        """Remove the lease of a dead writer unless another process has taken it meanwhile.

        Processes that find the same expired lease race for a marker, which is a lease on removing
        it. Its holder reads the lease again: no other process can replace the lease in between.
        """
        marker = path.with_name(f".{path.name}.{writer.attempt}")
        try:
            os.link(self._file, marker)
        except FileNotFoundError:  # another process removed the empty folder
            return
        except FileExistsError:
            found = read_writer(marker)
            if found is not None and not found[0].is_alive(self._touch() - found[1]):
                self._remove_expired(marker, found[0])
            return
        current = read_writer(path)
        if current is not None and current[0].attempt == writer.attempt:
            path.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether this process still holds the lease. It may have expired and been taken over."""
        found = read_writer(self._path(name))
        return found is not None and found[0].attempt == self.attempt

    def require(self, name: str) -> None:
        """Raise ``OutputError`` unless this process still holds the lease."""
        if not self.holds(name):
            raise taken_over(self._root)

    def release(self, name: str) -> None:
        """Release a lease. Does nothing if this process does not hold it."""
        self._held.discard(name)
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)

    def others(self) -> list[Writer]:
        """Return the other live processes that write to the folder."""
        found = live_writers(self._root, self._touch())
        return [writer for writer in found if writer.attempt != self.attempt]

    def require_alone(self, what: str) -> None:
        """Raise ``OutputError`` if another process writes to the folder.

        ``what`` names the operation that needs exclusive access, for the message.
        """
        if others := self.others():
            raise OutputError(
                f"{what} needs exclusive access to {self._root}, but another process is writing to "
                f"it: {', '.join(map(str, others))}. Wait for it to finish or stop it, then run "
                "the same call again. (A process that was killed on another machine counts as "
                f"alive for {EXPIRY_SECONDS:.0f} s.)"
            )

    @contextmanager
    def coordinating(self, progress: Progress) -> Iterator[None]:
        """Hold the `COORDINATOR` lease in the context; wait while another process holds it."""
        started, reported = time.monotonic(), ""
        while not self.take(COORDINATOR):
            found = read_writer(self._path(COORDINATOR))
            waited = time.monotonic() - started > PATIENCE_SECONDS
            if waited and found is not None and found[0].attempt != reported:
                reported = found[0].attempt
                progress.say(f"waiting for {found[0]} to prepare or finish the cache")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self.release(COORDINATOR)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _touch(self) -> float:
        """Touch this process's file and return its new time, by the file system's clock."""
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
            with suppress(OSError, OutputError):  # the next heartbeat tries again
                self._touch()


def taken_over(root: Path) -> OutputError:
    """Return the error for a process whose leases expired and were taken over."""
    return OutputError(
        f"{root} was taken over by another process because this one did not renew its leases for "
        f"more than {EXPIRY_SECONDS:.0f} s. Run the same call again to join that process."
    )


def writers_of(root: Path) -> list[Writer]:
    """Return the live processes that write to a folder, without touching a file.

    Ages are measured by this machine's clock, which may differ from the file system's.
    """
    return live_writers(root, time.time())


def live_writers(root: Path, now: float) -> list[Writer]:
    """Return the live processes that write to a folder; ``now`` is in seconds since the epoch."""
    files: list[Path] = []
    with suppress(FileNotFoundError):  # no process has written, or the last one removed it
        files = sorted((root / LEASES / WRITERS).glob("*.json"))
    found = [entry for path in files if (entry := read_writer(path)) is not None]
    return [writer for writer, touched in found if writer.is_alive(now - touched)]


def read_writer(path: Path) -> tuple[Writer, float] | None:
    """Return the writer that a file describes and the file's time; None if the file is gone.

    The file is opened before its time is read, because a network file system may otherwise return a
    cached time.
    """
    try:
        with path.open() as file:
            touched = os.fstat(file.fileno()).st_mtime
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return Writer(**json.loads(text)), touched
    except (ValueError, TypeError):  # a damaged file counts as a live writer until it expires
        return Writer(attempt="", host="an unknown host", machine="", pid=0, began=""), touched


def is_running(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def this_machine() -> str:
    """Return an id of the running system (since boot) and the process namespace."""
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
