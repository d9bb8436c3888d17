"""A folder is locked for writing by one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import OutputError
from embedcache.store import files
from embedcache.store.files import LOCK, writer_lock

HOLDER = """
import sys
from pathlib import Path
from embedcache.store.files import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=r"being written by another"), writer_lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with writer_lock(tmp_path):
        pass


def test_a_lock_on_a_removed_file_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that gives up removes the lock file; another may have opened it before."""
    real = files.fcntl.flock

    def flock(file: Any, how: int) -> None:
        (tmp_path / LOCK).unlink()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(OutputError, match=r"being written by another"), writer_lock(tmp_path):
        pass


def test_a_folder_that_takes_no_lock_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    monkeypatch.setattr(Path, "open", full)
    for name in ("new", "mine"):
        with pytest.raises(OSError, match="No space"), writer_lock(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.txt"]
