"""The files of a folder, and of Python's standard library, and the names of their documents."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from embedcache.errors import CorpusError

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".csv", ".parquet"})
# fmt: off
TEXT_SUFFIXES = frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".htm",
    ".srt",
    ".py", ".pyi", ".pyx", ".r", ".jl", ".lua", ".pl", ".pm", ".rb", ".php", ".sh", ".bash",
    ".zsh", ".fish", ".ps1", ".tcl",
    ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh", ".m", ".mm", ".cs",
    ".java", ".kt", ".kts", ".scala", ".swift", ".go", ".rs", ".zig", ".d", ".nim", ".f",
    ".f90", ".f95", ".pas", ".adb", ".ads", ".asm", ".s", ".v", ".sv", ".vhd", ".vhdl",
    ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".vue", ".svelte", ".css", ".scss", ".less",
    ".hs", ".ml", ".mli", ".fs", ".fsx", ".clj", ".cljs", ".ex", ".exs", ".erl", ".hrl", ".el",
    ".lisp", ".scm", ".rkt", ".lean",
    ".sql", ".graphql", ".proto", ".thrift", ".cmake", ".mk", ".gradle", ".nix", ".tf", ".toml",
    ".yaml", ".yml", ".ini", ".cfg", ".conf", ".xml", ".bib",
])
# fmt: on
TEXT_NAMES = frozenset({"README", "LICENSE", "COPYING", "Makefile", "Dockerfile", "CHANGELOG"})
# fmt: off
LEFT_OUT = frozenset([
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3",
    "encodings", "turtledemo", "pydoc_data",
])
# fmt: on
"""Folders of the standard library that are not read: tests, tables and third-party packages."""


def is_records(path: Path) -> bool:
    """Return whether a file holds records rather than one text."""
    return path.suffix.lower() in RECORD_SUFFIXES


def is_known(path: Path) -> bool:
    """Return whether a file in a folder is read: text, code or records by its suffix."""
    return is_records(path) or path.suffix.lower() in TEXT_SUFFIXES or path.name in TEXT_NAMES


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file under ``folder``, the entries of each folder sorted by name.

    Hidden files and folders are skipped, and links to folders are not followed.
    """
    with os.scandir(folder) as scan:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan)
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        path = folder / name
        if is_folder:
            yield from walk(path)
        elif path.is_file():
            yield path


def folder_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that are read; raise ``CorpusError`` if there are none."""
    found = False
    others: Counter[str] = Counter()
    for path in walk(folder):
        if is_known(path):
            found = True
            yield path
        elif not found:
            others[path.suffix or "no suffix"] += 1
    if not found:
        seen = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(8))
        raise CorpusError(
            f"{folder}: expected text, code, .jsonl, .csv or .parquet files, found "
            f"{seen or 'no files'}. Give a file itself to read it as text whatever its suffix."
        )


def name_under(path: Path, root: Path) -> str:
    """Return the name of a document: its path below ``root`` with forward slashes, as valid text.

    >>> name_under(Path("/data/a/b.txt"), Path("/data"))
    'a/b.txt'
    """
    raw = path.relative_to(root).as_posix()
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def library_files() -> Iterator[tuple[Path, str]]:
    """Yield the modules of Python's standard library, each with its name below the library.

    The order is by SHA-256 of the name, so that a limit takes from all parts of the library.

    Raises:
        CorpusError: this Python has no standard library on disk.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    named = [(path, name_under(path, folder)) for path in _modules(folder)]
    if not named:
        raise CorpusError(
            f"stdlib: expected Python's standard library as .py files in {folder}, found none. "
            "Give a folder of code instead."
        )
    yield from sorted(named, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def _modules(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in files:
            path = Path(place) / name
            if path.suffix == ".py" and path.is_file():
                yield path
