"""The Python standard library of this machine: a corpus of code that every machine has."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from embedcache.corpus.sources.folders import name_under
from embedcache.errors import CorpusError

LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "turtledemo",
        "pydoc_data",
    }
)


def library_files() -> Iterator[tuple[Path, str]]:
    """Yield the library's modules and their names relative to it, tests and tables left out.

    The order is by SHA-256 of the name, so that a limit takes from all over the library.
    Raises ``CorpusError`` where this Python has no library on disk.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    named = [(path, name_under(path, folder)) for path in _modules(folder)]
    if not named:
        raise CorpusError(
            f"stdlib: expected Python's standard library as .py files in {folder}, found none: "
            "name a folder of code instead."
        )
    yield from sorted(named, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def _modules(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in files:
            path = Path(place) / name
            if path.suffix == ".py" and path.is_file():
                yield path
