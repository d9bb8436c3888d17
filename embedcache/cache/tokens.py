"""The sealed tokens of a split: what pass 0 wrote, readable before any block is."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.damaged import WAY_OUT, reading
from embedcache.cache.layout import ATTRIBUTE
from embedcache.errors import CacheError

Array = np.ndarray[Any, Any]


class SplitTokens:
    """Reads what pass 0 sealed of one split; needs no manifest.

    Every method raises ``CacheError`` for what is damaged.
    """

    def __init__(self, cache: Path, name: str, block_tokens: int):
        self._block_tokens = block_tokens
        self._path = cache / name
        self._arrays: dict[str, zarr.Array[Any]] = {}
        with reading(self._path):
            self._group = zarr.open_group(self._path, mode="r")
        self.block_starts = self.table("tokens/blocks").astype(np.int64)

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array of the split."""
        if name not in self._arrays:
            with reading(self._path / name):
                found = self._group.get(name)
            if not isinstance(found, zarr.Array):
                raise CacheError(
                    f"{self._path}/{name} is missing or no array: the cache is damaged. {WAY_OUT}"
                )
            self._arrays[name] = found
        return self._arrays[name]

    def table(self, name: str) -> Array:
        """Return a whole table in memory."""
        return self._read(name, slice(None))

    def _read(self, name: str, rows: slice | int) -> Array:
        array = self.array(name)
        with reading(self._path / name):
            return np.asarray(array[rows])

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_starts) - 1

    def offsets(self, block: int) -> Array:
        """Return rows_S2 of a block: each sequence's first row and row past the last, in it."""
        first, stop = (int(v) for v in self.block_starts[block : block + 2])
        rows = self._read("tokens/offsets", slice(first, stop)).astype(np.int64)
        return rows - block * self._block_tokens

    def block_rows(self, block: int) -> int:
        """Return the rows of a block that are in use."""
        last = int(self.block_starts[block + 1]) - 1
        return int(self._read("tokens/offsets", last)[1]) - block * self._block_tokens

    def documents(self, block: int) -> Array:
        """Return document_S of a block: the document of each sequence."""
        first, stop = (int(v) for v in self.block_starts[block : block + 2])
        return self._read("tokens/document", slice(first, stop)).astype(np.int64)

    def used(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N, loss_mask_N) of a block; N is the rows in use."""
        start = block * self._block_tokens
        rows = slice(start, start + self.block_rows(block))
        ids_N = self._read("tokens/ids", rows).astype(np.int64)
        return ids_N, self._read("tokens/loss_mask", rows)

    def read(self, block: int) -> tuple[Array, Array, int]:
        """Return (ids_N, rows_S2, number of the block's first sequence)."""
        rows = slice(block * self._block_tokens, (block + 1) * self._block_tokens)
        ids = self._read("tokens/ids", rows).astype(np.int64)
        return ids, self.offsets(block), int(self.block_starts[block])

    @cached_property
    def totals(self) -> dict[str, int]:
        """Return the split's sequences, tokens, targets and documents, as sealed."""
        with reading(self._path):
            value: Any = self._group.attrs[ATTRIBUTE]
            return {key: int(value[key]) for key in ("sequences", "tokens", "targets", "documents")}
