"""Processes that begin with everything imported: real ones, to be killed, stopped and awaited.

Importing torch and transformers is most of what a short process does. Here one server has imported
them, and each process is forked from it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "embedcache.editing.append",
        "embedcache.editing.delete",
        "embedcache.extraction.extract",
        "embedcache.editing.merge",
        "embedcache.training.train",
        "embedcache_cli.app",
        "transformers.models.llama.modeling_llama",
    ]
)
CHANGING = ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
"""Calls of `os` that change the disk."""


_one = threading.Lock()
"""Held where exit codes are read, which `start`, too, does of all: each can be read once."""


def started(target: Callable[..., object], *arguments: Any) -> Any:
    """Return a process that calls ``target``, of a module that can be imported."""
    process = FORKS.Process(target=target, args=arguments, daemon=True)
    with _one:
        process.start()
    return process


def exit_code(process: Any, timeout: float = 120) -> int:
    """Wait for a process that was started; return its exit code, less than 0 if by a signal."""
    wait([process.sentinel], timeout)
    with _one:
        code = process.exitcode
    assert code is not None, "it has not come to its end"
    return int(code)


def run_forked(target: Callable[..., object], *arguments: Any) -> int:
    """Call ``target``, of a module that can be imported, in a process; return its exit code."""
    return exit_code(started(target, *arguments))


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module: str, name: str, call: Callable[[], object]) -> None:
    """Call, and die when that function is called: a process's target."""
    setattr(importlib.import_module(module), name, die)
    call()


def run_until_step(step: int, call: Callable[[], object]) -> tuple[int, int] | int:
    """Call, in a process that dies before so many calls of `CHANGING`: steps, not seconds.

    Returns the exit code; of one that comes to its end, its steps to the commit, and in all.
    """
    reader, writer = FORKS.Pipe(duplex=False)
    with reader, writer:
        code = run_forked(_die_at_step, step, call, writer)
        return code or reader.recv()


def _die_at_step(step: int, call: Callable[[], object], told: Connection) -> None:
    from embedcache.extraction import rehearsal
    from embedcache.store import transaction as rewrite

    rehearsal.ENOUGH_SECONDS = 1e-9  # as many blocks are tried each time
    done = committed = 0

    def counted(real: Any) -> Any:
        def counting(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            if done == step:
                die()
            done += 1
            return real(*arguments, **named)

        return counting

    finish = rewrite.finish_transaction

    def committing(cache: Path) -> Any:
        nonlocal committed
        committed = done
        return finish(cache)

    for name in CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    rewrite.finish_transaction = committing
    call()
    told.send((committed, done))


class ForkedCommand:
    """``embedcache`` in a process; of `subprocess.Popen`'s methods those that tests call."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = started(_command, arguments, environment or {}, *self._texts)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end, once; return what it has printed and said."""
        exit_code(self._process, timeout)
        with self._folder:
            printed, said = (path.read_text() if path.exists() else "" for path in self._texts)
        return printed, said


def _command(arguments: tuple[str, ...], environment: dict[str, str], *texts: Path) -> None:
    from embedcache_cli.app import main

    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's foreground job has it
    for descriptor, path in zip((1, 2), texts, strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["embedcache", *arguments]
    main()
