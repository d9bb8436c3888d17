"""Text files as documents; large ones in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document, Segment
from embedcache.corpus.encoding import UndecodableError, decode, decoded_blocks
from embedcache.corpus.summary import CorpusSummary

WHOLE_BYTES = 4 << 20
"""A larger file is never held whole."""
PIECE_CHARACTERS = 1 << 20
"""Characters of its pieces at most: tokenising takes some 130 bytes of memory for each."""


def text_documents(
    path: Path, name: str, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[Document]:
    """Yield the document in a text file, or its pieces, cut at line ends.

    Raises ``UndecodableError``, or counts the file, as ``config.undecodable`` has it.
    """
    summary.files += 1
    try:
        if path.stat().st_size <= WHOLE_BYTES:
            text = decode(path.read_bytes(), config.encoding, str(path))
            yield Document(name, (Segment(text, target=True),))
            return
        if config.undecodable == "skip":
            # Read it through first: a file is left out whole, not from its first bad byte on.
            for _ in decoded_blocks(path, config.encoding):
                pass
    except UndecodableError:
        if config.undecodable == "error":
            raise
        summary.skipped_undecodable += 1
        return
    yield from _pieces(decoded_blocks(path, config.encoding), name)


def _pieces(blocks: Iterator[str], name: str) -> Iterator[Document]:
    part = 0
    held = ""
    for block in blocks:
        held += block
        while len(held) > PIECE_CHARACTERS:
            # A line longer than a piece is cut where the piece ends.
            end = held.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            part += 1
            yield Document(name, (Segment(held[:end], target=True),), closed=False, part=part)
            held = held[end:]
    yield Document(name, (Segment(held, target=True),), part=part + 1)
