"""The tables of a split: the rows and the document of each sequence.

Axes: S sequences, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from embedcache.cache.format.arrays import zarr_codecs
from embedcache.cache.format.layout import TABLE_CHUNK, TABLES
from embedcache.cache.tokens.reader import SplitTokens

Array = np.ndarray[Any, Any]


class Table:
    """A growing Zarr array that is written in whole chunks, so that memory stays bounded."""

    def __init__(self, group: zarr.Group, name: str):
        dtype, columns = TABLES[name]
        self._array = group.create_array(
            name,
            shape=(0, *columns),
            chunks=(TABLE_CHUNK, *columns),
            dtype=dtype,
            **zarr_codecs("blosc", np.dtype(dtype).itemsize),
        )
        self._pending = np.empty((TABLE_CHUNK, *columns), dtype)
        self._rows = 0

    def extend(self, rows: Array) -> None:
        """Append rows; the last are written by `flush`."""
        while len(rows):
            fits = rows[: TABLE_CHUNK - self._rows]
            self._pending[self._rows : self._rows + len(fits)] = fits
            self._rows += len(fits)
            rows = rows[len(fits) :]
            if self._rows == TABLE_CHUNK:
                self.flush()

    def flush(self) -> None:
        """Write pending rows."""
        if self._rows:
            self._array.append(self._pending[: self._rows])
            self._rows = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTables:
    """All tables of a split in memory; int64 where nothing else is said.

    Attributes:
        rows_S2: first row and row past the last of each sequence, in the split.
        document_S: the document of each sequence: an index into the D documents of the split.
        block_starts: the first sequence of each block, then the number of sequences.
        index_D: the number of each document in the corpus.
        fingerprints: uint8 [documents, FINGERPRINT_BYTES], by which a document is recognised.
        names: the documents' names.
    """

    rows_S2: Array
    document_S: Array
    block_starts: Array
    index_D: Array
    fingerprints: Array
    names: tuple[str, ...]

    @classmethod
    def read(cls, tokens: SplitTokens) -> SplitTables:
        """Read all tables; raises ``CacheError`` if one is damaged."""
        return cls(
            rows_S2=tokens.table("tokens/offsets").astype(np.int64),
            document_S=tokens.table("tokens/document").astype(np.int64),
            block_starts=tokens.table("tokens/blocks").astype(np.int64),
            index_D=tokens.table("documents/index").astype(np.int64),
            fingerprints=tokens.table("documents/fingerprint"),
            names=tuple(tokens.names()),
        )

    def write(self, group: zarr.Group) -> None:
        """Write all tables into a split's group that has none."""
        encoded = [name.encode() for name in self.names]
        values = {
            "tokens/offsets": self.rows_S2,
            "tokens/document": self.document_S,
            "tokens/blocks": self.block_starts,
            "documents/index": self.index_D,
            "documents/fingerprint": self.fingerprints,
            "documents/name_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "documents/name_offsets": np.cumsum([0, *(len(name) for name in encoded)]),
        }
        for name, rows in values.items():
            table = Table(group, name)
            table.extend(rows)
            table.flush()

    def block_of(self, sequence_S: Array) -> Array:
        """Return the block of each sequence."""
        return np.searchsorted(self.block_starts, sequence_S, side="right") - 1
