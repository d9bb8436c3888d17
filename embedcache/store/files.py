"""Files published whole (write, fsync, rename) and their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embedcache.errors import OutputError

LOCK = ".lock"


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each one's name flushed to the disk; no harm if there."""
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
    """Hold a folder for writing, made if it is not there; refuse a second with ``OutputError``.

    The lock is the kernel's and goes with the process, however it ends.
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
            # Whoever gave up in between took the file away: a lock on that keeps nobody out.
            held = os.path.samestat((folder / LOCK).stat(), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise OutputError(
                f"{folder} is being written by another embedcache process: wait for it, or give "
                "another --out"
            )
        yield


def canonical_json(value: Any) -> str:
    """Return the one spelling of ``value`` that hashes are taken of: sorted keys, no spaces.

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
    """Copy every file of a folder, if it is there; an error is raised as it is, and at once.

    (`shutil.copytree` gathers them into one that says nothing of a full disk.)
    """
    for path in source.rglob("*"):
        if path.is_file():
            make_folder((target / path.relative_to(source)).parent)
            copy(path, target / path.relative_to(source))
