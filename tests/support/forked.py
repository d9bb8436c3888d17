"""Real processes that start with everything imported, to be killed, stopped and awaited.

A server process imports torch and transformers once, and each process is forked from it.
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
"""Functions of `os` that change the disk."""

_one = threading.Lock()
"""Held while exit codes are read: each can be read once, and `started` reads those of all."""


def started(target: Callable[..., object], *arguments: Any) -> Any:
    """Start a process that calls ``target``, a function of an importable module."""
    process = FORKS.Process(target=target, args=arguments, daemon=True)
    with _one:
        process.start()
    return process


def exit_code(process: Any, timeout: float = 120) -> int:
    """Wait for the end of a process; return its exit code, negative if a signal ended it."""
    wait([process.sentinel], timeout)
    with _one:
        code = process.exitcode
    assert code is not None, "the process has not ended"
    return int(code)


def run_forked(target: Callable[..., object], *arguments: Any) -> int:
    """Call ``target``, a function of an importable module, in a process; return its exit code."""
    return exit_code(started(target, *arguments))


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module: str, name: str, call: Callable[[], object]) -> None:
    """Run ``call``; die when it calls function ``name`` of ``module``. A process's target."""
    setattr(importlib.import_module(module), name, die)
    call()


def run_until_step(step: int, call: Callable[[], object]) -> tuple[int, int] | int:
    """Run ``call`` in a process that is killed before the given call of a `CHANGING` function.

    Returns the exit code. For a process that ends by itself: the number of such calls before the
    commit of the transaction, and of all.
    """
    reader, writer = FORKS.Pipe(duplex=False)
    with reader, writer:
        code = run_forked(_die_at_step, step, call, writer)
        return code or reader.recv()


def _die_at_step(step: int, call: Callable[[], object], result: Connection) -> None:
    from embedcache.store import transaction as rewrite

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
    result.send((committed, done))


class ForkedCommand:
    """The command ``embedcache`` in a process, with the methods of `subprocess.Popen` in use."""

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
        """Wait for the end of the process, once; return its stdout and stderr."""
        exit_code(self._process, timeout)
        with self._folder:
            stdout, stderr = (path.read_text() if path.exists() else "" for path in self._texts)
        return stdout, stderr


def _command(arguments: tuple[str, ...], environment: dict[str, str], *texts: Path) -> None:
    from embedcache_cli.app import main

    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground job
    for descriptor, path in zip((1, 2), texts, strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["embedcache", *arguments]
    main()
