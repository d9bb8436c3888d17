"""Tensors of the base that stage two needs, stored once: the head and the token embedding."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.arrays import zarr_codecs
from embedcache.cache.format.layout import shard_name
from embedcache.cache.shards.errors import translate_read_errors
from embedcache.cache.shards.shard import write_chunk
from embedcache.errors import CacheError
from embedcache.store.files import fsync_path

Array = np.ndarray[Any, Any]

CHUNK_ROWS = 4096
WRITERS = 8
"""The most threads that encode and write the chunks of an array."""


def write_base_array(group: zarr.Group, name: str, value: torch.Tensor) -> None:
    """Store a tensor losslessly: bfloat16 as its bit patterns, uint16.

    A float32 tensor whose values are all exact in bfloat16 (a base that computes in a wider type
    than that of its saved weights) is stored as bfloat16, too.
    """
    array, dtype = _stored(value)
    rows = min(CHUNK_ROWS, len(array))
    target = group.create_array(
        name,
        shape=array.shape,
        chunks=(rows, *array.shape[1:]),
        dtype=array.dtype,
        **zarr_codecs("blosc", array.itemsize),
    )
    _write_chunks(Path(target.store.root), target.path, array, rows)  # type: ignore[attr-defined]
    target.attrs["dtype"] = dtype


def _write_chunks(root: Path, name: str, array: Array, rows: int) -> None:
    """Write an array's chunks and flush each to the disk.

    zarr-python takes twice as long: its event loop copies every chunk.
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
    """Return a tensor as the array that Zarr stores, and the tensor's dtype."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
        value = value.bfloat16()
    dtype = str(value.dtype).removeprefix("torch.")
    stored = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    return stored.numpy(), dtype


def read_base_array(cache: Path, name: str) -> torch.Tensor | None:
    """Read a tensor that `write_base_array` stored under ``base/``; None if there is none.

    Raises ``CacheError`` if it is damaged.
    """
    return read_array(cache / "base" / name)


def read_array(path: Path) -> torch.Tensor | None:
    """Read a tensor that `write_base_array` stored at ``path``; None if there is none."""
    if not path.is_dir():
        return None
    with translate_read_errors(path):
        array = zarr.open_array(path, mode="r")
        value = torch.from_numpy(np.asarray(array[:]))
        return value.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else value


def read_token_embedding(cache: Path) -> torch.Tensor:
    """Return the base's token embedding [V, H]: the head's weight if the two are tied."""
    for name in ("token_embedding/weight", "head/weight"):
        value = read_base_array(cache, name)
        if value is not None:
            return value
    raise CacheError(
        f"{cache} holds no head: its folder 'base' is missing. Extract into a new folder."
    )
