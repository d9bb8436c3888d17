"""One shard file, written and read whole.

The bytes are those of Zarr v3's ``sharding_indexed`` codec: each chunk, encoded by its coder and
followed by its CRC-32C; then an index, followed by its CRC-32C. zarr-python is not used because it
holds the interpreter's lock, which would slow down a forward pass or a training step in parallel.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from embedcache.cache.codecs.coders import Coder
from embedcache.cache.manifest.file_record import FileRecord, hex_crc32c
from embedcache.cache.shards.errors import damaged_error, unreadable_error

Array = np.ndarray[Any, Any]


def write_shard(path: Path, values: Array, chunk_rows: int, coder: Coder) -> tuple[int, str]:
    """Write ``values`` [R, ...] as one shard in chunks of rows; return its size and SHA-256.

    The file is on the disk when this returns. R must be a multiple of ``chunk_rows``.
    """
    digest = hashlib.sha256()
    index = []
    offset = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, len(values), chunk_rows):
            chunk = coder.encode(values[start : start + chunk_rows])
            for part in (chunk, _checksum(chunk)):
                file.write(part)
                digest.update(part)
            index.append((offset, len(chunk) + 4))
            offset += len(chunk) + 4
        table = np.array(index, dtype="<u8").tobytes()
        for part in (table, _checksum(table)):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return offset + len(table) + 4, digest.hexdigest()


def read_shard(
    path: Path,
    *,
    rows: int,
    columns: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    chunks: int,
    coder: Coder,
    record: FileRecord | None = None,
) -> Array:
    """Return the first rows of a shard, decoded into one new array.

    Each chunk is one read, because each call that releases the interpreter's lock may delay the
    thread that launches a GPU's kernels.

    Args:
        path: the shard's file.
        rows: how many rows to return.
        columns: the shape of a row.
        dtype: the type of the integers.
        chunk_rows: rows of a chunk.
        chunks: number of chunks of the shard.
        coder: decodes a chunk.
        record: the file's record, which is compared; nothing is compared if None.

    Raises:
        CacheError: the file is missing or not the recorded one, or its index or a chunk fails its
            checksum or does not decode.
    """
    needed = -(-rows // chunk_rows)
    values = np.empty((needed * chunk_rows, *columns), dtype=dtype)
    sums = []
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if record is not None and (fault := record.size_fault(size)):
            raise damaged_error(path, fault)
        part = partial(_part, file.fileno(), size, path)
        table = part(size - 16 * chunks - 4, 16 * chunks + 4, "its index")
        places = np.frombuffer(table[:-4], dtype="<u8").reshape(chunks, 2).tolist()
        for number, (offset, length) in enumerate(places):
            if number < needed:
                what, out = f"chunk {number}", values[number * chunk_rows :][:chunk_rows]
                stored = part(offset, length, what)
                decode(coder, stored[:-4], out, what, path)
                sums.append(bytes(stored[-4:]))
            elif record is not None:
                sums.append(os.pread(file.fileno(), 4, offset + length - 4))
    if record is not None and (fault := record.chunks_fault(hex_crc32c(b"".join(sums)))):
        raise damaged_error(path, fault)
    return values[:rows]


def read_chunk(path: Path, *, shape: tuple[int, ...], dtype: str, coder: Coder) -> Array:
    """Return one chunk of an array without shards.

    Raises ``CacheError`` if it is missing, fails its checksum or does not decode. (zarr-python
    reads zeros for a file that is missing.)
    """
    values = np.empty(shape, dtype)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        stored = _part(file.fileno(), size, path, 0, size, "the chunk")
    decode(coder, stored[:-4], values, "the chunk", path)
    return values


def write_chunk(path: Path, values: Array, coder: Coder) -> None:
    """Write one chunk of an array without shards."""
    chunk = coder.encode(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk + _checksum(chunk))


def decode(coder: Coder, data: bytes | memoryview, out: Array, what: str, path: Path) -> None:
    """Decode a chunk into ``out``; raises ``CacheError`` naming the file."""
    try:
        coder.decode(data, out)
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable_error(path, f"{what} does not decode: {error}") from error


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise damaged_error(path, "is missing") from error


def _part(
    descriptor: int, size: int, path: Path, offset: int, length: int, what: str
) -> memoryview:
    """Return ``length`` bytes of a file; the last four are the checksum of the others."""
    if length < 4 or offset < 0 or offset + length > size:
        raise unreadable_error(path, f"{what} lies outside its {size} bytes")
    stored = os.pread(descriptor, length, offset)
    while len(stored) < length and (more := os.pread(descriptor, length, offset + len(stored))):
        stored = (stored + more)[:length]  # a read may return fewer bytes
    if google_crc32c.value(stored) != RESIDUE:
        raise unreadable_error(path, f"{what} fails its checksum")
    return memoryview(stored)


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


RESIDUE: int = google_crc32c.value(_checksum(b""))
"""The checksum of any bytes that are followed by their own checksum."""
