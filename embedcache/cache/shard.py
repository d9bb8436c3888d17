"""One shard file, written and read whole.

The bytes are those of Zarr v3's ``sharding_indexed`` codec: each chunk by its coder, then its
crc32c; an index (bytes, crc32c) at the end. Doing this here rather than through zarr-python keeps
the interpreter's lock free while coders work, so that a forward pass or a training step beside it
is not slowed down.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from embedcache.cache.coders import Coder
from embedcache.cache.damaged import WAY_OUT
from embedcache.errors import CacheError

Array = np.ndarray[Any, Any]
Stored = tuple[bytes, bytes]
Each = Callable[..., Iterable[None]]
"""As `map` does, or an executor's."""


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


def shard_bytes(values: Array, chunk_rows: int, coder: Coder) -> int:
    """Return the size of the shard that `write_shard` would write."""
    starts = range(0, len(values), chunk_rows)
    return sum(len(coder.encode(values[at : at + chunk_rows])) + 20 for at in starts) + 4


def read_shard(
    path: Path,
    *,
    rows: int,
    columns: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    chunks: int,
    coder: Coder,
    each: Each = map,
) -> Array:
    """Return the first ``rows`` of a shard of ``chunks`` chunks, decoded into one new array.

    ``each`` has the chunks decoded, one after the other or by an executor's threads. Raises
    ``CacheError`` where the index or a chunk fails its checksum or does not decode.
    """
    needed = -(-rows // chunk_rows)
    values = np.empty((needed * chunk_rows, *columns), dtype=dtype)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        index = _stored(file, size - 16 * chunks - 4, 16 * chunks + 4, "its index", path)
        table = _checked(index, "its index", path)
        places = np.frombuffer(table, dtype="<u8").reshape(chunks, 2)[:needed].tolist()

        def unpack(number: int, stored: Stored) -> None:
            what, out = f"chunk {number}", values[number * chunk_rows :][:chunk_rows]
            decode(coder, _checked(stored, what, path), out, what, path)

        read = (
            _stored(file, offset, length, f"chunk {number}", path)
            for number, (offset, length) in enumerate(places)
        )
        for _ in each(unpack, range(needed), read):
            pass
    return values[:rows]


def read_chunk(path: Path, *, shape: tuple[int, ...], dtype: str, coder: Coder) -> Array:
    """Return one chunk of an array without shards.

    Raises ``CacheError`` where it is missing, fails its checksum or does not decode: Zarr's own
    way, to read zeros for a file that is not there, serves what is damaged.
    """
    values = np.empty(shape, dtype)
    if not path.is_file():
        raise CacheError(f"{path} is missing: the cache is damaged. {WAY_OUT}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stored = _stored(file, 0, size, "the chunk", path)
        decode(coder, _checked(stored, "the chunk", path), values, "the chunk", path)
    return values


def write_chunk(path: Path, values: Array, coder: Coder) -> None:
    """Write one chunk of an array without shards, as zarr would."""
    chunk = coder.encode(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk + _checksum(chunk))


def decode(coder: Coder, data: bytes, out: Array, what: str, path: Path) -> None:
    """Decode a chunk into ``out``; raises ``CacheError`` naming the file."""
    try:
        coder.decode(data, out)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _damaged(path, f"{what} does not decode: {error}") from error


def _stored(file: BinaryIO, offset: int, length: int, what: str, path: Path) -> Stored:
    """Return ``length`` bytes: the data, and the checksum that ends them."""
    size = os.fstat(file.fileno()).st_size
    if length < 4 or offset < 0 or offset + length > size:
        raise _damaged(path, f"{what} lies outside its {size} bytes")
    file.seek(offset)
    return file.read(length - 4), file.read(4)


def _checked(stored: Stored, what: str, path: Path) -> bytes:
    """Return the data, once the checksum agrees."""
    data, checksum = stored
    if checksum != _checksum(data):
        raise _damaged(path, f"{what} fails its checksum")
    return data


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(f"{path} is damaged ({why}). {WAY_OUT}")
