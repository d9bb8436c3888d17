"""Simulates a disk that is full or read-only from the n-th step on, below one folder.

A step is one way in which embedcache, zarr or the standard library writes: making a file, a folder
or a link, or writing to a file. A full disk still takes the first half of a write, and files may be
removed and renamed; on a read-only disk they may not.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TAKING = ("mkdir", "link")
CHANGING = ("unlink", "rmdir", "rename", "replace", "utime")


class FailingDisk:
    """Counts the steps below ``root``; from ``fails_at`` on, each raises ``code``."""

    def __init__(self, root: Path, fails_at: int, code: int = errno.ENOSPC):
        self.steps = 0
        self._root = f"{root}{os.sep}"
        self._fails_at = fails_at
        self._code = code
        self._guard = threading.Lock()

    @property
    def failed(self) -> bool:
        return self.steps >= self._fails_at

    def holds(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and f"{path}{os.sep}".startswith(self._root)

    def full(self) -> bool:
        """Count a step; return whether it must fail."""
        with self._guard:
            self.steps += 1
            return self.failed

    def error(self, path: Any = None) -> OSError:
        text = os.strerror(self._code)
        return OSError(self._code, text) if path is None else OSError(self._code, text, str(path))


class _Written:
    """A file open for writing."""

    def __init__(self, file: Any, disk: FailingDisk):
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        if self._disk.full():
            self._file.write(data[: len(data) // 2])
            raise self._disk.error()  # like the kernel's, it names no file
        return int(self._file.write(data))

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing_disk(
    root: Path, fails_at: int = 1 << 60, code: int = errno.ENOSPC
) -> Iterator[FailingDisk]:
    """Make the disk below ``root`` fail from step ``fails_at`` on."""
    disk = FailingDisk(root, fails_at, code)
    real_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if not (disk.holds(file) and set(mode) & set("wax+")):
            return real_open(file, mode, *arguments, **more)
        there = Path(file).exists()
        if disk.full() and (code == errno.EROFS or not there):
            raise disk.error(file)
        return _Written(real_open(file, mode, *arguments, **more), disk)

    def taking(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            place = arguments[-1] if real is os.link else arguments[0]
            if disk.holds(place) and not Path(place).exists() and disk.full():
                raise disk.error(place)
            return real(*arguments, **more)

        return call

    def changing(real: Any) -> Any:
        def call(place: Any, *arguments: Any, **more: Any) -> Any:
            if disk.holds(place) and code == errno.EROFS and disk.failed:
                raise disk.error(place)
            return real(place, *arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        for name in TAKING:
            patch.setattr(os, name, taking(getattr(os, name)))
        for name in CHANGING:
            patch.setattr(os, name, changing(getattr(os, name)))
        yield disk
