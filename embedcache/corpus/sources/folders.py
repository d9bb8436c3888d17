"""Which files of a folder are read, and what they are called."""

from __future__ import annotations

import os
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


def is_records(path: Path) -> bool:
    """Tell whether a file holds records rather than one text."""
    return path.suffix.lower() in RECORD_SUFFIXES


def is_known(path: Path) -> bool:
    """Tell whether a file met in a folder is read: text, code or records by its suffix."""
    return is_records(path) or path.suffix.lower() in TEXT_SUFFIXES or path.name in TEXT_NAMES


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file under ``folder``, each folder's entries in order of name.

    Hidden files and folders are passed over; linked folders are not followed.
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
    """Yield the files of a folder that are read. Raises ``CorpusError`` where there are none."""
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
            f"{seen or 'no files'}: name a file itself to have it read as text whatever its suffix."
        )


def name_under(path: Path, root: Path) -> str:
    """Return the document's name: the path below ``root`` with forward slashes, always valid text.

    >>> name_under(Path("/data/a/b.txt"), Path("/data"))
    'a/b.txt'
    """
    raw = path.relative_to(root).as_posix()
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
