"""Files: published whole (write, fsync, rename), hashed, locked; and errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embedcache.errors import OutputError
from embedcache.units import format_bytes

LOCK = ".lock"
STAGING = ".staging"
"""Files of a folder that are not published yet lie here, in one folder for each attempt."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder under ``root`` to the disk."""
    with os.scandir(root) as entries:  # one at a time: a folder may hold a million
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                fsync_tree(Path(entry))
            else:
                fsync_path(Path(entry))
    fsync_path(root)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush their names to the disk; it may exist."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    The bytes are on the disk when this returns. Raises ``OSError`` as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        fsync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """Publish ``value`` as indented JSON with a closing newline."""
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for writing; make it if it is missing.

    The kernel releases the lock when the process ends, however it ends. Raises ``OutputError``
    where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = (folder / LOCK).open("w")
    except OSError:
        with suppress(OSError):  # not empty: it was there before
            folder.rmdir()
        raise
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that gave up in between removed the file: a lock on that excludes nobody.
            held = os.path.samestat((folder / LOCK).stat(), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise OutputError(
                f"{folder} is being written by another embedcache process: wait for it, or give "
                "another `out=`"
            )
        yield


@contextmanager
def translate_write_errors(out: Path) -> Iterator[None]:
    """Raise ``OutputError`` where the block fails because nothing more can be written to ``out``.

    A full disk's own error names no file. An error of another place, such as the corpus, and any
    other ``OSError`` pass unchanged.
    """
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else out
        if error.errno in _FULL:
            raise OutputError(
                f"expected room on the disk of {place}, found "
                f"{format_bytes(free_disk(place))} free ({error.strerror}): make room there, then "
                "run the same call again. Finished work is kept"
            ) from error
        if error.errno in _FORBIDDEN and _is_within(place.absolute(), out.absolute()):
            raise OutputError(
                f"expected permission to write {place}, found none ({error.strerror}): permit it, "
                "then run the same call again, or use another folder. Finished work is kept"
            ) from error
        raise


def _is_within(place: Path, out: Path) -> bool:
    """Whether a place is inside ``out`` or above it."""
    return place.is_relative_to(out) or out.is_relative_to(place)


def free_disk(place: Path) -> int:
    """Return the free bytes of the disk that ``place`` is or will be on."""
    existing = next(folder for folder in [place, *place.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free


def canonical_json(value: Any) -> str:
    """Return ``value`` as JSON with sorted keys and no spaces, the text that is hashed.

    >>> canonical_json({"b": 1, "a": [2.0]})
    '{"a":[2.0],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hash_json(value: Any) -> str:
    """Return the SHA-256 of ``canonical_json(value)`` as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_tree(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Copy every file of a folder with ``copy``; a folder that is missing has none.

    `shutil.copytree` gathers errors into one that does not mention a full disk; here the first
    error is raised unchanged.
    """
    for path in source.rglob("*"):
        if path.is_file():
            make_folder((target / path.relative_to(source)).parent)
            copy(path, target / path.relative_to(source))
