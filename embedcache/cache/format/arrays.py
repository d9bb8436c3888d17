"""The arrays of a cache as Zarr's metadata describes them: shapes, shards, chunks and coders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ArraySpec

CHUNK_ROWS = 2048
"""Rows of an inner chunk: the unit that is compressed and checksummed."""


def chunk_rows(spec: ArraySpec, block_tokens: int) -> int:
    """Return the rows of an inner chunk in blocks of that size.

    Coefficients have one chunk a block: a stream's header is paid once.
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
    """Create the empty arrays of a split's blocks, by path, in its group: one shard a block."""
    for path, spec in arrays.items():
        columns = spec.columns(hidden)
        group.create_array(
            path,
            shape=(blocks * block_tokens, *columns),
            shards=(block_tokens, *columns),
            chunks=(chunk_rows(spec, block_tokens), *columns),
            dtype=spec.dtype,
            fill_value=0,
            **checked(spec.coder, np.dtype(spec.dtype).itemsize),
        )


def checked(coder: str, itemsize: int) -> dict[str, Any]:
    """Return the codecs of an array, its coder's, then crc32c; chunks of zeros are files, too."""
    codecs = CODERS[coder].zarr_codecs(itemsize)
    codecs["compressors"] = [*codecs["compressors"], Crc32cCodec()]
    return codecs | {"config": {"write_empty_chunks": True}}
