"""Decode bytes to text and encode text as UTF-8, with errors that name the place."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from embedcache.errors import CorpusError

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = "\ufeff"
"""Some editors write it at the start of a file; it is not part of the text."""


class UndecodableError(CorpusError):
    """Bytes that are not text in the given encoding, or text that is not Unicode."""


def decode(data: bytes, encoding: str, where: str, start: int = 0) -> str:
    """Return ``data`` as text, without a byte order mark if ``start`` is 0.

    Args:
        data: the bytes.
        encoding: a name that Python knows.
        where: the file, or file and line, for the error.
        start: position of ``data`` in the file, for the error.

    Raises:
        UndecodableError: a byte is not text in the encoding.

    >>> decode(b"caf\\xc3\\xa9", "utf-8", "menu.txt")
    'café'
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(where, encoding, start + error.start) from error
    return text if start else text.removeprefix(BYTE_ORDER_MARK)


def _undecodable(where: str, encoding: str, byte: int) -> UndecodableError:
    return UndecodableError(
        f"{where}: expected {encoding} text, found other bytes at byte {byte:,}. "
        "Set `encoding=` to the file's encoding, such as latin-1, or `undecodable=` to skip."
    )


def decoded_blocks(path: Path, encoding: str) -> Iterator[str]:
    """Yield a file's text in blocks of about 1 MiB, with its line ends.

    Raises:
        UndecodableError: a byte is not text in the encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    with path.open("rb") as file:
        while True:
            data = file.read(BLOCK_BYTES)
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                byte = position - len(pending) + error.start
                raise _undecodable(str(path), encoding, byte) from error
            if position == 0:
                text = text.removeprefix(BYTE_ORDER_MARK)
            position += len(data)
            if text:
                yield text
            if not data:
                return


def encode(text: str, where: str) -> bytes:
    """Return ``text`` as UTF-8; raise ``UndecodableError`` for half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UndecodableError(
            f"{where}: expected Unicode text, found half a surrogate pair "
            f"(U+{ord(text[error.start]):04X}) at character {error.start:,}. "
            "Correct the record, or set `undecodable=` to skip."
        ) from error
