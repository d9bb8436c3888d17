"""The record of a file: its size and checksums when it was written, compared when it is read.

Size and ``crc32c`` are compared on every read. That costs one small read a chunk, and detects
chunks in the wrong place; a chunk's own checksum detects damage inside it. `verify` compares the
SHA-256.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from embedcache.cache.shards.errors import damaged_error
from embedcache.store.files import hash_file


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file: path inside the cache, size in bytes, SHA-256 and `chunks_crc32c` in hex."""

    path: str
    bytes: int
    sha256: str
    crc32c: str

    def size_fault(self, found: int) -> str | None:
        """Return what is wrong with a file of ``found`` bytes, or None."""
        return None if found == self.bytes else f"has {found} bytes, expected {self.bytes}"

    def chunks_fault(self, found: str) -> str | None:
        """Return what is wrong with a file whose `chunks_crc32c` is ``found``, or None."""
        return None if found == self.crc32c else "holds other chunks than were written there"


FILE = np.dtype([("bytes", "<u8"), ("crc32c", "<u4"), ("sha256", "V32")])
"""A file's record in a digest table; its path follows from its place there."""


def packed(record: FileRecord) -> tuple[int, int, bytes]:
    """Return a record as a digest table holds it."""
    return record.bytes, int(record.crc32c, 16), bytes.fromhex(record.sha256)


def unpacked(row: Any, path: str) -> FileRecord:
    """Return the record of the file at ``path`` from its ``row`` in a digest table."""
    size, crc32c, digest = row.item()
    return FileRecord(path=path, bytes=size, sha256=digest.hex(), crc32c=f"{crc32c:08x}")


def record_file(path: Path, name: str, *, chunks: int | None = None) -> FileRecord:
    """Return the record, under ``name``, of a file: one chunk, or a shard of ``chunks`` chunks."""
    return FileRecord(
        path=name,
        bytes=path.stat().st_size,
        sha256=hash_file(path),
        crc32c=chunks_crc32c(path, chunks),
    )


def chunks_crc32c(path: Path, chunks: int | None) -> str:
    """Return, in hex, the CRC-32C of the checksums at the ends of a file's chunks, in order.

    Args:
        path: the file.
        chunks: the number of chunks of a shard; None for a file that is one chunk.

    Returns:
        Eight hex digits; an empty string for a file that is too small.
    """
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        places = [size]
        if chunks is not None:
            if size < 16 * chunks + 4:
                return ""
            index = os.pread(descriptor, 16 * chunks, size - 16 * chunks - 4)
            places = [a + b for a, b in np.frombuffer(index, "<u8").reshape(-1, 2).tolist()]
        if any(not 4 <= place <= size for place in places):
            return ""
        sums = b"".join(os.pread(descriptor, 4, place - 4) for place in places)
    return hex_crc32c(sums)


def hex_crc32c(data: bytes) -> str:
    """Return the CRC-32C of bytes as eight hex digits."""
    return f"{google_crc32c.value(data):08x}"


def fault_in(cache: Path, record: FileRecord, *, chunks: int | None = None) -> str | None:
    """Compare a file's size and its chunks' checksums; return what is wrong, or None."""
    path = cache / record.path
    try:
        if (fault := _size_fault(path, record)) is not None:
            return fault
        return record.chunks_fault(chunks_crc32c(path, chunks))
    except OSError as error:  # a disk that is failing
        return f"cannot be read ({error.strerror})"


def content_fault(cache: Path, record: FileRecord) -> str | None:
    """Compare a file's SHA-256; return what is wrong, or None."""
    path = cache / record.path
    try:
        if (fault := _size_fault(path, record)) is not None:
            return fault
        return None if hash_file(path) == record.sha256 else "fails its SHA-256"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _size_fault(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return "is missing"
    return record.size_fault(path.stat().st_size)


def check_files(cache: Path, records: Iterable[FileRecord]) -> None:
    """Raise ``CacheError`` for the first file that differs from its record; each is one chunk.

    The chunk's own checksum is checked by its reader.
    """
    for record in records:
        if (fault := fault_in(cache, record)) is not None:
            raise damaged_error(cache / record.path, fault)
