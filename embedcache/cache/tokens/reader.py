"""Reads the tokens and documents of a split, which exist before its embeddings.

Axes: N rows of a block (one row per token), S sequences of a block.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.layout import ATTRIBUTE, ROWS, TABLE_CHUNK, TABLES
from embedcache.cache.shards.errors import damaged_error, translate_read_errors
from embedcache.cache.shards.shard import read_chunk
from embedcache.cache.tokens.files import TokenFiles, chunk_name

Array = np.ndarray[Any, Any]

CACHED_CHUNKS = 32
"""Number of table chunks cached in memory: 4 MB, enough for a window of shuffled blocks."""


class SplitTokens:
    """Reads the tokens and documents of one split; needs no manifest.

    No chunk is read on construction. Chunks are read without zarr-python, whose overhead of half a
    millisecond per call would slow down training. Every method raises ``CacheError`` for a damaged
    file.

    Args:
        cache: the cache's folder.
        name: the split.
        block_tokens: the rows of a block.
        files: the records to check each chunk against when it is read; None skips the check.
    """

    def __init__(self, cache: Path, name: str, block_tokens: int, files: TokenFiles | None = None):
        self._block_tokens = block_tokens
        self._path = cache / name
        self._files = files
        with translate_read_errors(self._path):
            self._group = zarr.open_group(self._path, mode="r")
        self._table_chunk = lru_cache(CACHED_CHUNKS)(self._chunk)

    def table(self, name: str) -> Array:
        """Return a whole array in memory."""
        rows = self._length(name)
        size = self._block_tokens if name in ROWS else TABLE_CHUNK
        parts = [self._chunk(name, number) for number in range(-(-rows // size))]
        dtype, columns = ROWS.get(name) or TABLES[name]
        return np.concatenate(parts)[:rows] if parts else np.empty((0, *columns), dtype)

    def _length(self, name: str) -> int:
        with translate_read_errors(self._path / name):
            found = self._group.get(name)
        if isinstance(found, zarr.Array):
            return int(found.shape[0])
        raise damaged_error(self._path / name, "is missing or is not an array")

    def _chunk(self, name: str, number: int) -> Array:
        """Return a chunk of an array.

        The file is checked after it is read, because another process may replace it before.
        """
        dtype, columns = ROWS.get(name) or TABLES[name]
        rows = self._block_tokens if name in ROWS else TABLE_CHUNK
        path = self._path.parent / chunk_name(self._path.name, name, number)
        chunk = read_chunk(path, shape=(rows, *columns), dtype=dtype, coder=CODERS["blosc"])
        if self._files is not None:
            self._files.check(name, number)
        return chunk

    def _table_rows(self, name: str, first: int, stop: int) -> Array:
        """Return rows ``first`` to ``stop`` (exclusive) of a table as int64, from cached chunks."""
        parts = []
        for number in range(first // TABLE_CHUNK, -(-stop // TABLE_CHUNK)):
            start = number * TABLE_CHUNK
            parts.append(self._table_chunk(name, number)[max(first - start, 0) : stop - start])
        found = np.concatenate(parts) if parts else np.empty((0, *TABLES[name][1]))
        return found.astype(np.int64)

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return self._length("tokens/blocks") - 1

    def bounds(self, block: int) -> tuple[int, int]:
        """Return the number of a block's first sequence and of the one after its last."""
        first, stop = self._table_rows("tokens/blocks", block, block + 2).tolist()
        return first, stop

    def offsets(self, block: int) -> Array:
        """Return rows_S2, int64: the first row of each sequence and the row after its last.

        Rows are counted from the start of the block.
        """
        return self._table_rows("tokens/offsets", *self.bounds(block)) - block * self._block_tokens

    def block_rows(self, block: int) -> int:
        """Return the number of rows of a block that hold tokens; the rest is padding."""
        return int(self.offsets(block)[:, 1].max(initial=0))

    def documents(self, block: int) -> Array:
        """Return document_S, int64: the document number of each sequence of a block."""
        return self._table_rows("tokens/document", *self.bounds(block))

    def used(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N int64, loss_mask_N bool) of a block, without padding rows."""
        rows = self.block_rows(block)
        ids_N = self._chunk("tokens/ids", block)[:rows].astype(np.int64)
        return ids_N, self._chunk("tokens/loss_mask", block)[:rows]

    def names(self) -> list[str]:
        """Return the names of the split's documents."""
        ends = self.table("documents/name_offsets").astype(np.int64).tolist()
        text = self.table("documents/name_bytes").tobytes()
        return [text[a:b].decode() for a, b in pairwise(ends)]

    def spans(self, block: int) -> Array:
        """Return span_N2, uint32: each token's byte range in its document, with padding rows."""
        return self._chunk("tokens/span", block)

    def read(self, block: int) -> tuple[Array, Array, int]:
        """Return (ids_N, rows_S2, number of the block's first sequence), with padding rows."""
        ids_N = self._chunk("tokens/ids", block).astype(np.int64)
        return ids_N, self.offsets(block), self.bounds(block)[0]

    @cached_property
    def totals(self) -> dict[str, int]:
        """The numbers of sequences, tokens, targets and documents of the split."""
        with translate_read_errors(self._path):
            value: Any = self._group.attrs[ATTRIBUTE]
            return {key: int(value[key]) for key in ("sequences", "tokens", "targets", "documents")}
