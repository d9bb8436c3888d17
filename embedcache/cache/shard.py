"""One shard file, written and read whole.

The bytes are those of Zarr v3's ``sharding_indexed`` codec with inner codecs bytes (little endian),
blosc, crc32c, and an index (bytes, crc32c) at the end: any Zarr implementation reads them. Doing
this here rather than through zarr-python keeps the interpreter's lock free while blosc works, so
that a forward pass or a training step beside it is not slowed down.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Final

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc

from embedcache.cache.damaged import WAY_OUT
from embedcache.errors import CacheError

Array = np.ndarray[Any, Any]

COMPRESSOR: Final = "zstd"
LEVEL = 3


def write_shard(path: Path, values: Array, chunk_rows: int) -> tuple[int, str]:
    """Write ``values`` [R, ...] as one shard in chunks of rows; return its size and SHA-256.

    The file is on the disk when this returns. R must be a multiple of ``chunk_rows``.
    """
    blosc = Blosc(cname=COMPRESSOR, clevel=LEVEL, shuffle=Blosc.SHUFFLE)
    digest = hashlib.sha256()
    index = []
    offset = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, len(values), chunk_rows):
            chunk = blosc.encode(np.ascontiguousarray(values[start : start + chunk_rows]))
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
    path: Path, *, rows: int, columns: tuple[int, ...], dtype: str, chunk_rows: int, chunks: int
) -> Array:
    """Return the first ``rows`` of a shard of ``chunks`` chunks, decoded into one new array.

    Raises ``CacheError`` where the index or a chunk fails its checksum or does not decode.
    """
    blosc = Blosc(cname=COMPRESSOR, clevel=LEVEL, shuffle=Blosc.SHUFFLE)
    needed = -(-rows // chunk_rows)
    values = np.empty((needed * chunk_rows, *columns), dtype=dtype)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        table = _checked(file, size - 16 * chunks - 4, 16 * chunks + 4, "its index", path)
        places = np.frombuffer(table, dtype="<u8").reshape(chunks, 2)[:needed].tolist()
        for number, (offset, length) in enumerate(places):
            chunk = _checked(file, offset, length, f"chunk {number}", path)
            target = values[number * chunk_rows : (number + 1) * chunk_rows]
            holds = int.from_bytes(chunk[4:8], "little")  # blosc's header; a shorter one decodes
            if holds != target.nbytes:
                raise _damaged(
                    path, f"chunk {number} holds {holds} bytes, expected {target.nbytes}"
                )
            try:
                blosc.decode(chunk, out=target)
            except (RuntimeError, ValueError) as error:
                raise _damaged(path, f"chunk {number} does not decode: {error}") from error
    return values[:rows]


def _checked(file: BinaryIO, offset: int, length: int, what: str, path: Path) -> bytes:
    """Return ``length`` bytes less the checksum that ends them, once that agrees."""
    size = os.fstat(file.fileno()).st_size
    if length < 4 or offset < 0 or offset + length > size:
        raise _damaged(path, f"{what} lies outside its {size} bytes")
    file.seek(offset)
    data, stated = file.read(length - 4), file.read(4)
    if stated != _checksum(data):
        raise _damaged(path, f"{what} fails its checksum")
    return data


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(f"{path} is damaged ({why}). {WAY_OUT}")
