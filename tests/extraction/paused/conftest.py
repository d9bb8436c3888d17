"""A process that is suspended, and the cache that it writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support.fixtures_extract import write_documents
from support.fixtures_paused import DELETED, Pause, run
from support.tiny import tiny_base_directory

from embedcache.editing.delete import delete
from embedcache.extraction import pipeline
from embedcache.store import lease as leases


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base, a corpus of about ten blocks, their cache, and the cache without one document."""
    root = tmp_path_factory.mktemp("paused")
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", 8, words=120)
    run(root, root / "whole")
    delete(shutil.copytree(root / "whole", root / "deleted"), [DELETED])
    return root


class Inline:
    """An executor without threads, so that a whole process is suspended at once."""

    def __init__(self, *_: object, **__: object):
        pass

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future

    def shutdown(self, *, wait: bool) -> None:
        pass


@pytest.fixture
def pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pause]:
    """Call ``act`` before the n-th call of a function, with the leases of this process expired."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 1e6)
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(pipeline, "prefetch", lambda dealt: dealt)
    paused = []

    def at(module: Any, name: str, call: int, act: Callable[[], object]) -> None:
        real, calls = getattr(module, name), 0

        def stopping(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                paused.append(name)
                monkeypatch.setattr(module, name, real)
                (beat,) = (tmp_path / "cache/leases/writers").iterdir()
                os.utime(beat, (1, 1))
                act()
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, stopping)

    yield at
    assert len(paused) == 1
