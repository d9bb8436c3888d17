"""The sealed tokens of a split: what pass 0 wrote, readable before any block is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.coders import CODERS
from embedcache.cache.damaged import WAY_OUT, reading
from embedcache.cache.layout import ATTRIBUTE, TABLE_CHUNK, shard_name
from embedcache.cache.records import FileRecord, fault_in
from embedcache.cache.shard import read_chunk
from embedcache.errors import CacheError

Array = np.ndarray[Any, Any]


class SplitTokens:
    """Reads what pass 0 sealed of one split; needs no manifest.

    Whatever is read once a block is read chunk by chunk, without zarr-python: half a millisecond a
    call is what a trainer would wait for. Every method raises ``CacheError`` for what is damaged.
    """

    def __init__(
        self,
        cache: Path,
        name: str,
        block_tokens: int,
        sealed: Mapping[str, FileRecord] | None = None,
    ):
        """Open them; with ``sealed``, a table that was rewritten since is refused, not read."""
        self._block_tokens = block_tokens
        self._cache = cache
        self._path = cache / name
        self._sealed = sealed or {}
        with reading(self._path):
            self._group = zarr.open_group(self._path, mode="r")
        self._recent: dict[str, tuple[int, Array]] = {}
        self.block_starts = self.table("tokens/blocks").astype(np.int64)

    def table(self, name: str) -> Array:
        """Return a whole table in memory."""
        with reading(self._path / name):
            found = self._group.get(name)
            if isinstance(found, zarr.Array):
                return np.asarray(found[:])
        raise CacheError(
            f"{self._path}/{name} is missing or no array: the cache is damaged. {WAY_OUT}"
        )

    def _chunk(self, name: str, number: int, dtype: str, shape: tuple[int, ...]) -> Array:
        path = self._path.joinpath(name, "c", str(number), *["0"] * (len(shape) - 1))
        return read_chunk(path, shape=shape, dtype=dtype, coder=CODERS["blosc"])

    def _rows(self, name: str, first: int, stop: int, dtype: str, *columns: int) -> Array:
        """Return rows of a table of one row a sequence; the last chunk read is kept."""
        parts = []
        for number in range(first // TABLE_CHUNK, -(-stop // TABLE_CHUNK)):
            kept, chunk = self._recent.get(name, (-1, np.empty(0)))
            if kept != number:
                chunk = self._chunk(name, number, dtype, (TABLE_CHUNK, *columns))
                path = shard_name(f"{self._path.name}/{name}", number, 1 + len(columns))
                if path in self._sealed:  # once it is read: a delete may be under way
                    self._check(self._sealed[path])
                self._recent[name] = (number, chunk)
            start = number * TABLE_CHUNK
            parts.append(chunk[max(first - start, 0) : stop - start])
        return np.concatenate(parts) if parts else np.empty((0, *columns), dtype)

    def _check(self, record: FileRecord) -> None:
        if (fault := fault_in(self._cache, record)) is not None:
            raise CacheError(
                f"{self._cache / record.path} {fault}: documents were added to the cache, or "
                f"deleted, since it was opened, or it is damaged. Open it again. {WAY_OUT}"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_starts) - 1

    def offsets(self, block: int) -> Array:
        """Return rows_S2 of a block: each sequence's first row and row past the last, in it."""
        first, stop = (int(v) for v in self.block_starts[block : block + 2])
        rows = self._rows("tokens/offsets", first, stop, "uint64", 2).astype(np.int64)
        return rows - block * self._block_tokens

    def block_rows(self, block: int) -> int:
        """Return the rows of a block that are in use."""
        return int(self.offsets(block)[:, 1].max(initial=0))

    def documents(self, block: int) -> Array:
        """Return document_S of a block: the document of each sequence."""
        first, stop = (int(v) for v in self.block_starts[block : block + 2])
        return self._rows("tokens/document", first, stop, "uint32").astype(np.int64)

    def used(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N, loss_mask_N) of a block; N is the rows in use."""
        rows, shape = self.block_rows(block), (self._block_tokens,)
        ids_N = self._chunk("tokens/ids", block, "uint32", shape)[:rows].astype(np.int64)
        return ids_N, self._chunk("tokens/loss_mask", block, "bool", shape)[:rows]

    def names(self) -> list[str]:
        """Return the names of the split's documents."""
        ends = self.table("documents/name_offsets").astype(np.int64).tolist()
        text = self.table("documents/name_bytes").tobytes()
        return [text[a:b].decode() for a, b in pairwise(ends)]

    def spans(self, block: int) -> Array:
        """Return span_R2 of a block: the bytes of each token in its document."""
        return self._chunk("tokens/span", block, "uint32", (self._block_tokens, 2))

    def read(self, block: int) -> tuple[Array, Array, int]:
        """Return (ids_N, rows_S2, number of the block's first sequence); N is R, the block's."""
        ids_N = self._chunk("tokens/ids", block, "uint32", (self._block_tokens,))
        return ids_N.astype(np.int64), self.offsets(block), int(self.block_starts[block])

    @cached_property
    def totals(self) -> dict[str, int]:
        """Return the split's sequences, tokens, targets and documents, as sealed."""
        with reading(self._path):
            value: Any = self._group.attrs[ATTRIBUTE]
            return {key: int(value[key]) for key in ("sequences", "tokens", "targets", "documents")}
