"""What stage two needs of the base, stored once in the cache: its head and token embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import zarr

from embedcache.cache.arrays import checked
from embedcache.cache.damaged import reading
from embedcache.errors import CacheError


def write_base_array(group: zarr.Group, name: str, value: torch.Tensor) -> None:
    """Store a tensor of the base losslessly: bfloat16 as its bit patterns.

    A float32 tensor whose every value is a bfloat16 (a base computed in a wider type than its
    weights were saved in) is stored as bfloat16, too.
    """
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
        value = value.bfloat16()
    dtype = str(value.dtype).removeprefix("torch.")
    stored = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    array = stored.numpy()
    chunks = (min(4096, array.shape[0]), *array.shape[1:])
    target = group.create_array(
        name,
        shape=array.shape,
        chunks=chunks,
        dtype=array.dtype,
        **checked("blosc", array.itemsize),
    )
    target[:] = array
    target.attrs["dtype"] = dtype


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
