"""What stage two needs of the base, stored once in the cache: its head and token embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs.blosc import Blosc

from embedcache.cache.codecs import compressors
from embedcache.cache.damaged import reading
from embedcache.cache.shard import COMPRESSOR, LEVEL

CHUNK_ROWS = 4096
METADATA_BYTES = 780
"""Of an array's zarr.json, about."""
SAMPLED_CHUNKS = 16


def write_base_array(group: zarr.Group, name: str, value: torch.Tensor) -> None:
    """Store a tensor of the base losslessly: bfloat16 as its bit patterns.

    A float32 tensor whose every value is a bfloat16 (a base computed in a wider type than its
    weights were saved in) is stored as bfloat16, too.
    """
    array, dtype = _stored(value)
    chunks = (min(CHUNK_ROWS, array.shape[0]), *array.shape[1:])
    target = group.create_array(
        name,
        shape=array.shape,
        chunks=chunks,
        dtype=array.dtype,
        compressors=compressors(array.itemsize),
    )
    target[:] = array
    target.attrs["dtype"] = dtype


def base_array_bytes(value: torch.Tensor) -> int:
    """Return what `write_base_array` will take, from chunks all over the tensor."""
    array, _ = _stored(value)
    rows = min(CHUNK_ROWS, len(array))
    starts = range(0, len(array), rows)
    blosc = Blosc(cname=COMPRESSOR, clevel=LEVEL, shuffle=Blosc.SHUFFLE)
    sampled = sorted({len(starts) * i // SAMPLED_CHUNKS for i in range(SAMPLED_CHUNKS)})
    found = 0
    for number in sampled:
        chunk = np.zeros((rows, *array.shape[1:]), array.dtype)
        part = array[starts[number] : starts[number] + rows]
        chunk[: len(part)] = part
        found += len(blosc.encode(chunk)) + 4
    return found * len(starts) // len(sampled) + METADATA_BYTES


def _stored(value: torch.Tensor) -> tuple[np.ndarray[Any, Any], str]:
    """Return the array that Zarr stores of a tensor, and the tensor's own dtype."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
        value = value.bfloat16()
    dtype = str(value.dtype).removeprefix("torch.")
    stored = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    return stored.numpy(), dtype


def read_base_array(cache: Path, name: str) -> torch.Tensor | None:
    """Read what `write_base_array` stored; None where there is no such array.

    Raises ``CacheError`` where it is damaged.
    """
    path = cache / "base" / name
    if not path.is_dir():
        return None
    with reading(path):
        array = zarr.open_array(path, mode="r")
        value = torch.from_numpy(np.asarray(array[:]))
        return value.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else value
