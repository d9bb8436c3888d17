"""Reading the blocks of one split of a finished cache, whole.

Axes: N rows of a block that are in use, H hidden, S readable sequences of a block, J top ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.cache.calibration import open_codecs
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS, ArraySpec, Codec, codec_name
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import TOP_IDS, CacheAttributes, block_arrays, shard_name
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.manifest.file_record import FileRecord
from embedcache.cache.manifest.manifest import SplitManifest
from embedcache.cache.shards.errors import translate_read_errors
from embedcache.cache.shards.shard import read_shard
from embedcache.cache.tokens.files import TokenFiles
from embedcache.cache.tokens.reader import SplitTokens

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block in memory, its embeddings still as the integers of their codec.

    Attributes:
        ids_N: token ids, int64.
        loss_mask_N: bool; true where the token is a target.
        arrays: by tap, then by group of the codec: integers [N, H], scales [N].
        rows_S2: first row and row past the last of each sequence, within the block, int64.
        sequence_S: numbers of the sequences in the split, int64; quarantined ones are left out.
        document_S: number of each sequence's document in the split, int64.
        top_ids_NJ: int32, if asked for; see `embedcache.cache.format.layout.LIKELY`.
    """

    ids_N: Array
    loss_mask_N: Array
    arrays: dict[str, dict[str, Array]]
    rows_S2: Array
    sequence_S: Array
    document_S: Array
    top_ids_NJ: Array | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One block in memory, its embeddings decoded.

    Attributes:
        ids_N: token ids, int64.
        loss_mask_N: bool; true where the token is a target. The embedding before it predicts it.
        x_NH: by tap, the embeddings, bfloat16, on the CPU.
        rows_S2: first row and row past the last of each sequence, within the block, int64.
        sequence_S: numbers of the sequences in the split, int64; quarantined ones are left out.
        document_S: number of each sequence's document in `SplitReader.documents`, int64.
    """

    ids_N: Array
    loss_mask_N: Array
    x_NH: dict[str, torch.Tensor]
    rows_S2: Array
    sequence_S: Array
    document_S: Array


class SplitReader:
    """Reads one split of a cache; made by `Cache.split`. Nothing of its blocks is read before use.

    Attributes:
        name: ``train``, ``dev`` or ``test``.
        manifest: the split's counts: sequences, tokens, targets, documents, blocks, bytes.
        taps: the taps that are stored.
        top_ids: how many top ids a position has; 0 if none are stored.
        files: the records of the blocks' files.
    """

    def __init__(
        self,
        cache: Path,
        name: str,
        attributes: CacheAttributes,
        manifest: SplitManifest,
        tokens: Digests,
    ):
        self.name = name
        self.manifest = manifest
        self.taps = attributes.settings.taps
        self.top_ids = attributes.settings.top_ids
        self.files = manifest.files(cache, name, attributes.settings)
        self._cache = cache
        self._rows = attributes.settings.block_tokens
        self._hidden = attributes.base["hidden_size"]
        self._settings = attributes.settings
        self._arrays = block_arrays(name, attributes.settings)
        self._tokens = SplitTokens(cache, name, self._rows, TokenFiles(cache, name, tokens))

    def __repr__(self) -> str:
        counts = self.manifest
        return f"SplitReader({self.name!r}, blocks={counts.blocks}, tokens={counts.tokens})"

    @cached_property
    def documents(self) -> list[str]:
        """Names of the split's documents."""
        return self._tokens.names()

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each tap."""
        return open_codecs(self._cache, self.name, self._settings)

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays that the split's codec stores of a tap."""
        return ARRAYS[codec_name(self.name, self._settings.codec)]

    def sequences(self, block: int) -> tuple[Array, Array, Array]:
        """Return (sequence_S, rows_S2, document_S) of a block's readable sequences, int64."""
        first, stop = self._tokens.bounds(block)
        document = self._tokens.documents(block)
        sequence = np.arange(first, stop)
        keep = ~np.isin(sequence, self.files.quarantined_in(first, stop))
        return sequence[keep], self._tokens.offsets(block)[keep], document[keep]

    def tokens(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N int64, loss_mask_N bool) of a block."""
        return self._tokens.used(block)

    def block(self, block: int, taps: tuple[str, ...] | None = None) -> Block:
        """Read and decode a block on the CPU.

        Args:
            block: its number, below ``manifest.blocks``.
            taps: the taps to read; all that are stored if None.

        Raises:
            CacheError: a file is missing, is not the one that the manifest records, or fails its
                checksum.
        """
        stored = self.stored(block, self.taps if taps is None else taps)
        x_NH = {
            tap: self.codecs[tap].decode(
                {group: torch.from_numpy(values) for group, values in arrays.items()}, stored.ids_N
            )
            for tap, arrays in stored.arrays.items()
        }
        return Block(
            stored.ids_N,
            stored.loss_mask_N,
            x_NH,
            stored.rows_S2,
            stored.sequence_S,
            stored.document_S,
        )

    def stored(self, block: int, taps: tuple[str, ...], top_ids: bool = False) -> StoredBlock:
        """Read a block's tokens and integers; with ``top_ids``, those too (they must be stored).

        Raises ``CacheError`` as `block` does.
        """
        records = {record.path: record for record in self.files[block]}
        ids_N, loss_mask_N = self.tokens(block)
        with translate_read_errors(self._cache / self.name):
            shard = partial(self._shard, records=records, block=block, rows=len(ids_N))
            arrays = {
                tap: {spec.group: shard(f"{spec.group}/{tap}") for spec in self.specs}
                for tap in taps
            }
            top_ids_NJ = shard(TOP_IDS) if top_ids else None
        sequence_S, rows_S2, document_S = self.sequences(block)
        return StoredBlock(ids_N, loss_mask_N, arrays, rows_S2, sequence_S, document_S, top_ids_NJ)

    def block_bytes(self, taps: tuple[str, ...], *, top_ids: bool = False) -> int:
        """Return the bytes that a full block takes in memory, as `stored` reads it."""
        token = np.dtype(np.int64).itemsize + np.dtype(bool).itemsize
        row = token + len(taps) * sum(map(self._row_bytes, self.specs))
        if top_ids:
            row += self._row_bytes(self._arrays[TOP_IDS])
        return self._rows * row

    def _row_bytes(self, spec: ArraySpec) -> int:
        return np.dtype(spec.dtype).itemsize * math.prod(spec.columns(self._hidden))

    def _shard(self, array: str, *, records: dict[str, FileRecord], block: int, rows: int) -> Array:
        spec = self._arrays[array]
        size = chunk_rows(spec, self._rows)
        name = shard_name(f"{self.name}/{array}", block, 1 + spec.wide)
        return read_shard(
            self._cache / name,
            rows=rows,
            columns=spec.columns(self._hidden),
            dtype=spec.dtype,
            chunk_rows=size,
            chunks=self._rows // size,
            coder=CODERS[spec.coder],
            record=records[name],
        )
