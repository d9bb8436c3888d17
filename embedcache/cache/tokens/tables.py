"""The tables of a split: which rows are which sequence, of which document.

Axes: S sequences, D documents, B blocks, F bytes of a fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from embedcache.cache.format.arrays import checked
from embedcache.cache.format.layout import TABLE_CHUNK, TABLES
from embedcache.cache.tokens.reader import SplitTokens

Array = np.ndarray[Any, Any]


class Table:
    """A growing Zarr array that is appended in whole chunks, so that memory stays bounded."""

    def __init__(self, group: zarr.Group, name: str):
        dtype, columns = TABLES[name]
        self._array = group.create_array(
            name,
            shape=(0, *columns),
            chunks=(TABLE_CHUNK, *columns),
            dtype=dtype,
            **checked("blosc", np.dtype(dtype).itemsize),
        )
        self._pending = np.empty((TABLE_CHUNK, *columns), dtype)
        self._rows = 0

    def extend(self, rows: Array) -> None:
        """Append rows, sooner or later."""
        while len(rows):
            fits = rows[: TABLE_CHUNK - self._rows]
            self._pending[self._rows : self._rows + len(fits)] = fits
            self._rows += len(fits)
            rows = rows[len(fits) :]
            if self._rows == TABLE_CHUNK:
                self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self._rows:
            self._array.append(self._pending[: self._rows])
            self._rows = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTables:
    """All tables of a split in memory; numbers are int64.

    ``rows_S2``: first row and row past the last of each sequence, in the split. ``document_S``:
    its document, a number in ``index_D`` (of the corpus), ``names`` and ``fingerprint_DF``, bytes
    by which it is known again. ``starts_B``: the first sequence of each block and, at the end, the
    number of sequences.
    """

    rows_S2: Array
    document_S: Array
    starts_B: Array
    index_D: Array
    fingerprint_DF: Array
    names: tuple[str, ...]

    @classmethod
    def read(cls, tokens: SplitTokens) -> SplitTables:
        """Read them; raises ``CacheError`` where one is damaged."""
        return cls(
            rows_S2=tokens.table("tokens/offsets").astype(np.int64),
            document_S=tokens.table("tokens/document").astype(np.int64),
            starts_B=tokens.table("tokens/blocks").astype(np.int64),
            index_D=tokens.table("documents/index").astype(np.int64),
            fingerprint_DF=tokens.table("documents/fingerprint"),
            names=tuple(tokens.names()),
        )

    def write(self, group: zarr.Group) -> None:
        """Write them into a split's group that has none."""
        encoded = [name.encode() for name in self.names]
        values = {
            "tokens/offsets": self.rows_S2,
            "tokens/document": self.document_S,
            "tokens/blocks": self.starts_B,
            "documents/index": self.index_D,
            "documents/fingerprint": self.fingerprint_DF,
            "documents/name_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "documents/name_offsets": np.cumsum([0, *(len(name) for name in encoded)]),
        }
        for name, rows in values.items():
            table = Table(group, name)
            table.extend(rows)
            table.flush()

    def block_of(self, sequence_S: Array) -> Array:
        """Return the block of each sequence."""
        return np.searchsorted(self.starts_B, sequence_S, side="right") - 1
