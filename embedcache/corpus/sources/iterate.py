"""Iterate over the documents of sources: files, folders, patterns, data sets, ``stdlib:``."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary, Document
from embedcache.corpus.render.record import record_document
from embedcache.corpus.sources.folders import folder_files, is_records, library_files, name_under
from embedcache.corpus.sources.hub import hub_records, is_saved_dataset, saved_records
from embedcache.corpus.sources.record_files import Record, file_records
from embedcache.corpus.sources.text_files import text_documents
from embedcache.errors import CorpusError, nearest

COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"})


def iterate_documents(
    sources: Iterable[str],
    config: CorpusConfig,
    tokenizer: Any = None,
    summary: CorpusSummary | None = None,
) -> Iterator[Document]:
    """Yield the documents of each source, in an order that is the same on every machine.

    Names are unique within a source.

    Args:
        sources: a file, a folder (read recursively, sorted by name), a glob pattern, a folder that
            ``save_to_disk`` wrote, ``hf:org/name``, ``hf:/folder`` or ``stdlib:``.
        config: how files and records are read.
        tokenizer: the tokenizer whose chat template renders chats; None if there are no chats.
        summary: counts the files that are read and the documents that are skipped.

    Raises:
        CorpusError: a source does not exist or cannot be read.
    """
    counts = CorpusSummary() if summary is None else summary
    reader = _SourceReader(config, tokenizer, counts)
    for source in sources:
        yield from reader.documents(source)


class _SourceReader:
    def __init__(self, config: CorpusConfig, tokenizer: Any, summary: CorpusSummary) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.summary = summary

    def documents(self, source: str) -> Iterator[Document]:
        if source.startswith("hf:"):
            yield from self._hub(source.removeprefix("hf:"))
        elif source == "stdlib:":
            for path, name in library_files():
                yield from text_documents(path, name, self.config, self.summary)
        else:
            yield from self._path(source)

    def _path(self, source: str) -> Iterator[Document]:
        path = Path(source).expanduser()
        if path.is_dir():
            if is_saved_dataset(path):
                records = saved_records(path, self.config, self.summary)
                yield from self._records(records, path.resolve().name, str(path))
                return
            for file in folder_files(path):
                yield from self._file(file, name_under(file, path))
        elif path.is_file():
            yield from self._file(path, name_under(path, path.parent))
        elif glob.has_magic(source):
            yield from self._matches(path)
        else:
            raise CorpusError(_missing(source, path))

    def _matches(self, pattern: Path) -> Iterator[Document]:
        root = Path(*_plain_parts(pattern))
        files = sorted(
            path
            for path in map(Path, glob.iglob(str(pattern), recursive=True))  # noqa: PTH207
            if path.is_file()
        )
        if not files:
            raise CorpusError(
                f"{pattern}: expected files that match this pattern, found none in {root}. "
                "Use ** to search subfolders, and quote the pattern in a shell."
            )
        for path in files:
            yield from self._file(path, name_under(path, root))

    def _file(self, path: Path, name: str) -> Iterator[Document]:
        if is_records(path):
            records = file_records(path, self.config, self.summary)
            yield from self._records(records, name, str(path))
        elif path.suffix.lower() in COMPRESSED:
            raise CorpusError(
                f"{path}: expected text or records, found a compressed file. Unpack it first."
            )
        else:
            yield from text_documents(path, name, self.config, self.summary)

    def _hub(self, name: str) -> Iterator[Document]:
        path = Path(name).expanduser()
        if not name:
            raise CorpusError(
                "hf: expected a data set, found none. Give, for example, hf:org/name."
            )
        if is_saved_dataset(path):
            records = saved_records(path, self.config, self.summary)
        else:
            records = hub_records(str(path) if path.is_dir() else name, self.config, self.summary)
        short = path.resolve().name if path.is_dir() else name
        yield from self._records(records, short, f"hf:{name}")

    def _records(
        self, records: Iterator[tuple[int, Record]], name: str, where: str
    ) -> Iterator[Document]:
        for number, record in records:
            yield record_document(
                record, f"{name}:{number}", f"{where}:{number}", self.config, self.tokenizer
            )


def _plain_parts(pattern: Path) -> list[str]:
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _missing(source: str, path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    siblings = [entry.name for entry in folder.iterdir()]
    close = nearest(path.name, siblings)
    hint = f" For a data set of the hub, give hf:{source}." if source.count("/") == 1 else ""
    return f"{source}: expected a file, folder or pattern, found nothing there.{close}{hint}"
