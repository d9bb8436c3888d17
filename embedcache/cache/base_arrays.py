"""What stage two needs of the base, stored once in the cache: its head and token embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.arrays import checked
from embedcache.cache.coders import CODERS
from embedcache.cache.damaged import reading
from embedcache.errors import CacheError

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
        **checked("blosc", array.itemsize),
    )
    target[:] = array
    target.attrs["dtype"] = dtype


def base_array_bytes(value: torch.Tensor) -> int:
    """Return what `write_base_array` will take, from chunks all over the tensor."""
    array, _ = _stored(value)
    rows = min(CHUNK_ROWS, len(array))
    starts = range(0, len(array), rows)
    sampled = sorted({len(starts) * i // SAMPLED_CHUNKS for i in range(SAMPLED_CHUNKS)})
    found = 0
    for number in sampled:
        chunk = np.zeros((rows, *array.shape[1:]), array.dtype)
        part = array[starts[number] : starts[number] + rows]
        chunk[: len(part)] = part
        found += len(CODERS["blosc"].encode(chunk)) + 4
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
    """Read what `write_base_array` stored under ``base/``; None where there is no such array.

    Raises ``CacheError`` where it is damaged.
    """
    return read_array(cache / "base" / name)


def read_array(path: Path) -> torch.Tensor | None:
    """Read an array that `write_base_array` stored at ``path``; None where there is none."""
    if not path.is_dir():
        return None
    with reading(path):
        array = zarr.open_array(path, mode="r")
        value = torch.from_numpy(np.asarray(array[:]))
        return value.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else value


def read_token_embedding(cache: Path) -> torch.Tensor:
    """Return the base's token embedding [V, H]: the head's weight where the two are tied."""
    for name in ("token_embedding/weight", "head/weight"):
        value = read_base_array(cache, name)
        if value is not None:
            return value
    raise CacheError(f"{cache} holds no head: its 'base' is missing. Extract again.")
