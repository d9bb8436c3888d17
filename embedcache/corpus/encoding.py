"""Bytes to text, with errors that say where the bytes stop making sense."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from embedcache.errors import CorpusError

BLOCK_BYTES = 1 << 20


BYTE_ORDER_MARK = "\ufeff"
"""Some editors start a file with it; it is no part of the text."""


class UndecodableError(CorpusError):
    """Bytes that are not text in the encoding named."""


def decode(data: bytes, encoding: str, where: str, start: int = 0) -> str:
    """Return ``data`` as text, without a byte order mark where ``start`` is 0.

    Raises ``UndecodableError`` naming the byte, counted from ``start``.

    >>> decode(b"caf\\xc3\\xa9", "utf-8", "menu.txt")
    'café'
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise undecodable(where, encoding, start + error.start) from error
    return text if start else text.removeprefix(BYTE_ORDER_MARK)


def undecodable(where: str, encoding: str, byte: int) -> UndecodableError:
    """Return the error for a byte that is not text."""
    return UndecodableError(
        f"{where}: expected {encoding} text, found something else at byte {byte:,}: "
        "type --encoding latin-1 (or the file's own), or --undecodable skip."
    )


def decoded_blocks(path: Path, encoding: str) -> Iterator[str]:
    """Yield a file's text in blocks of about 1 MiB, line ends as they are.

    Raises ``UndecodableError`` naming the byte of the file.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    with path.open("rb") as file:
        while True:
            data = file.read(BLOCK_BYTES)
            held = decoder.getstate()[0]
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                byte = position - len(held) + error.start
                raise undecodable(str(path), encoding, byte) from error
            if position == 0:
                text = text.removeprefix(BYTE_ORDER_MARK)
            position += len(data)
            if text:
                yield text
            if not data:
                return


def encode(text: str, where: str) -> bytes:
    """Return ``text`` as UTF-8. Raises ``UndecodableError`` for half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UndecodableError(
            f"{where}: expected Unicode text, found half a surrogate pair "
            f"(U+{ord(text[error.start]):04X}) at character {error.start:,}: "
            "mend the record, or type --undecodable skip."
        ) from error
