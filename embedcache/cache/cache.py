"""Opening a finished cache and reading its blocks whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.base_arrays import read_base_array, read_token_embedding
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS, STATELESS, ArraySpec, Codec, codec_name
from embedcache.cache.codecs.transform import Calibration, codecs_of
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    TOP_IDS,
    CacheAttributes,
    ExtractSettings,
    block_arrays,
    shard_name,
)
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.manifest.file_record import FileRecord
from embedcache.cache.manifest.manifest import Manifest, SplitManifest, read_manifest
from embedcache.cache.shards.errors import WAY_OUT, reading
from embedcache.cache.shards.shard import read_shard
from embedcache.cache.tokens.files import TokenFiles
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import CacheError, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block in memory, its embeddings still in their codec's integers.

    N is the rows in use; sequences are those of the block, in order. ``ids_N``, ``loss_mask_N``:
    tokens and targets. ``arrays``: by tap and group of the codec, [N] or [N, H]. ``rows_S2``:
    first row and row past the last of each sequence, within the block. ``sequence_S``: their
    numbers in the split. ``document_S``: their documents. Quarantined sequences are left out of the
    S axes. ``top_ids_NK``: int32, if it was asked for; see `embedcache.cache.format.layout.LIKELY`.
    """

    ids_N: Array
    loss_mask_N: Array
    arrays: dict[str, dict[str, Array]]
    rows_S2: Array
    sequence_S: Array
    document_S: Array
    top_ids_NK: Array | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One block in memory, as `StoredBlock`, its embeddings decoded: bfloat16 by tap."""

    ids_N: Array
    loss_mask_N: Array
    x_NH: dict[str, torch.Tensor]
    rows_S2: Array
    sequence_S: Array
    document_S: Array


def open_codecs(cache: Path, split: str, settings: ExtractSettings) -> dict[str, Codec]:
    """Return the codec of each tap of a split; raises ``CacheError`` for a damaged calibration."""
    if codec_name(split, settings.codec) in STATELESS:
        return codecs_of(split, settings, {}, None)
    calibrations = {tap: Calibration.load(cache, tap) for tap in settings.taps}
    return codecs_of(split, settings, calibrations, read_token_embedding(cache))


class SplitReader:
    """Reads one split of a cache."""

    def __init__(
        self,
        cache: Path,
        name: str,
        attributes: CacheAttributes,
        manifest: SplitManifest,
        sealed: Digests,
    ):
        """Open it; nothing of its blocks is read."""
        self.name = name
        self.manifest = manifest
        self.taps = attributes.settings.taps
        self._cache = cache
        self._rows = attributes.settings.block_tokens
        self._hidden = attributes.base["hidden_size"]
        self._settings = attributes.settings
        self._specs = ARRAYS[codec_name(name, attributes.settings.codec)]
        self._arrays = block_arrays(name, attributes.settings)
        self.top_ids = attributes.settings.top_ids
        self.files = manifest.files(cache, name, attributes.settings)
        self._tokens = SplitTokens(cache, name, self._rows, TokenFiles(cache, name, sealed))

    def sequences(self, block: int) -> tuple[Array, Array, Array]:
        """Return (sequence_S, rows_S2, document_S) of a block's readable sequences."""
        first, stop = self._tokens.bounds(block)
        document = self._tokens.documents(block)
        sequence = np.arange(first, stop)
        keep = ~np.isin(sequence, self.files.aside(first, stop))
        return sequence[keep], self._tokens.offsets(block)[keep], document[keep]

    def tokens(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N, loss_mask_N) of a block; N is the rows in use."""
        return self._tokens.used(block)

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each tap."""
        return open_codecs(self._cache, self.name, self._settings)

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays that the split's codec stores of a tap."""
        return self._specs

    def block_bytes(self, taps: tuple[str, ...], *, top_ids: bool = False) -> int:
        """Return the bytes that a full block takes in memory, as `stored` reads it."""
        token = np.dtype(np.int64).itemsize + np.dtype(bool).itemsize
        row = token + len(taps) * sum(map(self._row_bytes, self._specs))
        if top_ids:
            row += self._row_bytes(self._arrays[TOP_IDS])
        return self._rows * row

    def _row_bytes(self, spec: ArraySpec) -> int:
        return np.dtype(spec.dtype).itemsize * math.prod(spec.columns(self._hidden))

    def block(self, block: int, taps: tuple[str, ...] | None = None) -> Block:
        """Read and decode a block on the CPU; ``taps`` defaults to all that are stored.

        Raises as `stored` does.
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
        """Read a block's tokens and integers, and with ``top_ids`` those; it must store them.

        Raises ``CacheError`` where a file is missing or not the one that the manifest states, or
        where a chunk fails its checksum.
        """
        records = {record.path: record for record in self.files[block]}
        ids_N, loss_mask_N = self.tokens(block)
        with reading(self._cache / self.name):
            shard = partial(self._shard, records=records, block=block, rows=len(ids_N))
            arrays = {
                tap: {spec.group: shard(f"{spec.group}/{tap}") for spec in self._specs}
                for tap in taps
            }
            top_ids_NK = shard(TOP_IDS) if top_ids else None
        sequence_S, rows_S2, document_S = self.sequences(block)
        return StoredBlock(ids_N, loss_mask_N, arrays, rows_S2, sequence_S, document_S, top_ids_NK)

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

    @cached_property
    def documents(self) -> list[str]:
        """Names of the split's documents."""
        return self._tokens.names()


class Cache:
    """A finished cache: its attributes, manifest, splits and the base's head.

    Raises ``CacheError`` for a cache that is unfinished, of a newer schema, or has metadata, a
    head or a calibration that is not as it was written. What grows with the cache (blocks, tables,
    digest tables) is neither read nor looked at before it is used, and is checked then.
    """

    def __init__(self, path: Path):
        self.path = path
        self.attributes = read_attributes(path)
        self.manifest: Manifest = read_manifest(path)
        self.manifest.sealed.check(path)
        self.manifest.base.check(path)
        self.manifest.codec.check(path)

    def split(self, name: str) -> SplitReader:
        """Return a split's reader; raises ``CacheError`` if it holds no sequence."""
        manifest = self.manifest.splits.get(name)
        if manifest is None or not manifest.sequences:
            filled = [key for key, split in self.manifest.splits.items() if split.sequences]
            raise CacheError(
                f"{self.path} has no '{name}' split (it has: {', '.join(filled)}). Splits are by "
                f"document: extract more documents, or give a corpus of its own with --{name}."
            )
        return SplitReader(self.path, name, self.attributes, manifest, self.manifest.sealed)

    def has(self, name: str) -> bool:
        """Whether a split holds any sequence."""
        return name in self.manifest.splits and self.manifest.splits[name].sequences > 0

    def require_taps(self, taps: tuple[str, ...]) -> None:
        """Raise ``CacheError`` unless every tap is stored."""
        stored = self.attributes.settings.taps
        for tap in taps:
            if tap not in stored:
                raise CacheError(
                    f"{self.path} stores no tap '{tap}' (it stores {', '.join(stored)})."
                    f"{nearest(tap, stored)} Extract it with: --taps {','.join([*stored, tap])}"
                )

    def base_array(self, name: str) -> torch.Tensor | None:
        """Return an array of ``base/`` (such as ``head/weight``) as a tensor, or None if absent."""
        return read_base_array(self.path, name)

    def head_settings(self) -> dict[str, float | None]:
        """Return the settings of the base's head: scale, divisor, soft-cap."""
        head = self.path / "base" / "head"
        with reading(head):
            return dict(zarr.open_group(head, mode="r").attrs)  # type: ignore[arg-type]


def read_attributes(path: Path) -> CacheAttributes:
    """Read a cache's root attributes; raises ``CacheError`` if ``path`` is not a cache."""
    if not path.exists():
        raise CacheError(
            f"no such cache: {path}. Make one with: embedcache extract CORPUS --out {path}"
        )
    root = path / "zarr.json"
    with reading(root):
        group = zarr.open_group(path, mode="r") if root.is_file() else None
    if group is None or ATTRIBUTE not in group.attrs:
        raise CacheError(f"{path} is not an embedcache cache: expected {root} with its attributes")
    value = group.attrs[ATTRIBUTE]
    if not isinstance(value, dict):
        raise CacheError(f"{root} holds damaged embedcache attributes. {WAY_OUT}")
    return CacheAttributes.from_dict(value, path=path)
