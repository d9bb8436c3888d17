"""What stage two needs of the base, stored once in the cache: its head and token embedding."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.arrays import checked
from embedcache.cache.format.layout import shard_name
from embedcache.cache.shards.errors import reading
from embedcache.cache.shards.shard import write_chunk
from embedcache.errors import CacheError
from embedcache.store.files import fsync_path

Array = np.ndarray[Any, Any]

CHUNK_ROWS = 4096
WRITERS = 8
"""Threads that code and write the chunks of an array, at most."""


def write_base_array(group: zarr.Group, name: str, value: torch.Tensor) -> None:
    """Store a tensor of the base losslessly: bfloat16 as its bit patterns.

    A float32 tensor whose every value is a bfloat16 (a base computed in a wider type than its
    weights were saved in) is stored as bfloat16, too.
    """
    array, dtype = _stored(value)
    rows = min(CHUNK_ROWS, len(array))
    target = group.create_array(
        name,
        shape=array.shape,
        chunks=(rows, *array.shape[1:]),
        dtype=array.dtype,
        **checked("blosc", array.itemsize),
    )
    _write_chunks(Path(target.store.root), target.path, array, rows)  # type: ignore[attr-defined]
    target.attrs["dtype"] = dtype


def _write_chunks(root: Path, name: str, array: Array, rows: int) -> None:
    """Write an array's chunks, as zarr would, and flush each to the disk.

    By zarr it takes twice as long: its event loop copies every chunk.
    """

    def write(number: int) -> None:
        chunk = array[number * rows : (number + 1) * rows]
        if len(chunk) < rows:
            chunk = np.concatenate(
                [chunk, np.zeros((rows - len(chunk), *chunk.shape[1:]), chunk.dtype)]
            )
        path = root / shard_name(name, number, array.ndim)
        write_chunk(path, chunk, CODERS["blosc"])
        fsync_path(path)

    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
        list(pool.map(write, range(-(-len(array) // rows))))


def _stored(value: torch.Tensor) -> tuple[Array, str]:
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
