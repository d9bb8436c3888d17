"""Read text files as documents, and large files in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary, Document, Segment
from embedcache.corpus.encoding import UndecodableError, decode, decoded_blocks

WHOLE_BYTES = 4 << 20
"""A larger file is read in parts."""
PART_CHARACTERS = 1 << 20
"""Largest part of a file; tokenising takes about 130 bytes of memory for each character."""


def text_documents(
    path: Path, name: str, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[Document]:
    """Yield the document of a text file, or its parts, which end at line ends.

    Raises:
        UndecodableError: the file is not text and ``config.undecodable`` is ``error``.
    """
    summary.files += 1
    try:
        if path.stat().st_size <= WHOLE_BYTES:
            text = decode(path.read_bytes(), config.encoding, str(path))
            yield Document(name, (Segment(text, target=True),))
            return
        if config.undecodable == "skip":
            # Decode the whole file first, so that it is skipped as a whole.
            for _ in decoded_blocks(path, config.encoding):
                pass
    except UndecodableError:
        if config.undecodable == "error":
            raise
        summary.skipped_undecodable += 1
        return
    yield from _parts(decoded_blocks(path, config.encoding), name)


def _parts(blocks: Iterator[str], name: str) -> Iterator[Document]:
    part = 0
    pending = ""
    for block in blocks:
        pending += block
        while len(pending) > PART_CHARACTERS:
            # A line longer than a part is cut.
            end = pending.rfind("\n", 0, PART_CHARACTERS) + 1 or PART_CHARACTERS
            part += 1
            yield Document(name, (Segment(pending[:end], target=True),), closed=False, part=part)
            pending = pending[end:]
    yield Document(name, (Segment(pending, target=True),), part=part + 1)
