"""The arrays of a cache as Zarr's metadata describes them: shapes, shards, chunks and codecs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from embedcache.cache.codecs.coders import BLOSC_BLOCK, COMPRESSOR, LEVEL
from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.codecs.zarr_pco import PcoCodec

CHUNK_ROWS = 2048
"""Rows of an inner chunk: the unit that is compressed and checksummed."""


def chunk_rows(spec: ArraySpec, block_tokens: int) -> int:
    """Return the rows of an inner chunk in blocks of that size.

    Coefficients have one chunk a block, so that the header of a stream is stored once.
    """
    if spec.coder == "pco" or block_tokens % CHUNK_ROWS:
        return block_tokens
    return CHUNK_ROWS


def create_arrays(
    group: zarr.Group,
    arrays: Mapping[str, ArraySpec],
    *,
    blocks: int,
    block_tokens: int,
    hidden: int,
) -> None:
    """Create the empty arrays of a split's blocks in its group, by path: one shard a block."""
    for path, spec in arrays.items():
        columns = spec.columns(hidden)
        group.create_array(
            path,
            shape=(blocks * block_tokens, *columns),
            shards=(block_tokens, *columns),
            chunks=(chunk_rows(spec, block_tokens), *columns),
            dtype=spec.dtype,
            fill_value=0,
            **zarr_codecs(spec.coder, np.dtype(spec.dtype).itemsize),
        )


def zarr_codecs(coder: str, itemsize: int) -> dict[str, Any]:
    """Return the arguments of ``create_array`` for chunks of a coder, then their CRC-32C.

    A chunk of zeros is a file, too: a file that is missing is damage.
    """
    codecs: dict[str, Any] = {"compressors": [Crc32cCodec()]}
    if coder == "pco":
        codecs["serializer"] = PcoCodec()
    else:
        blosc = BloscCodec(
            cname=COMPRESSOR,
            clevel=LEVEL,
            shuffle="shuffle",
            blocksize=BLOSC_BLOCK,
            typesize=itemsize,
        )
        codecs["compressors"].insert(0, blosc)
    return codecs | {"config": {"write_empty_chunks": True}}
