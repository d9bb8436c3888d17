"""Storing what stage two needs of the base: its head, and its token embedding where untied."""

from __future__ import annotations

import shutil
from pathlib import Path

import zarr

from embedcache.base.load import Base
from embedcache.base.taps import is_tied, token_embedding_of
from embedcache.cache.base_arrays import Cost, base_array_cost, write_base_array
from embedcache.store.files import fsync_path, fsync_tree

METADATA_BYTES = 280
"""Of the groups under ``base``."""


def base_cost(out: Path, base: Base, scratch: Path | None) -> Cost:
    """Return what `store_base` will take, where nothing is stored yet."""
    if (out / "base").is_dir():
        return Cost()
    tensors = [base.head.weight_VH]
    if base.head.bias_V is not None:
        tensors.append(base.head.bias_V)
    if not is_tied(base.model):
        tensors.append(token_embedding_of(base.model).get_parameter("weight"))
    return sum((base_array_cost(tensor, scratch) for tensor in tensors), Cost(METADATA_BYTES))


def store_base(out: Path, base: Base, staging: Path, *, again: bool = False) -> None:
    """Store the head, and the token embedding where it is not the head, once and whole.

    They are made in ``staging``. ``again`` puts them in the place of what is there.
    """
    if (out / "base").is_dir() and not again:
        return
    made, old = staging / "base", staging / "base.old"
    try:
        group = zarr.create_group(made, zarr_format=3)
        head = group.create_group("head")
        head.attrs.update(dict(base.head.settings))
        write_base_array(head, "weight", base.head.weight_VH)
        if base.head.bias_V is not None:
            write_base_array(head, "bias", base.head.bias_V)
        if not is_tied(base.model):
            embedding = token_embedding_of(base.model).get_parameter("weight")
            write_base_array(group, "token_embedding/weight", embedding)
        fsync_tree(made)
        if (out / "base").exists():
            (out / "base").rename(old)
        made.rename(out / "base")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(out)
