"""Opening a finished cache and reading its blocks whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.base_arrays import read_base_array
from embedcache.cache.codecs import ArraySpec, chunk_rows, codec_for
from embedcache.cache.layout import ATTRIBUTE, CacheAttributes, shard_name
from embedcache.cache.manifest import Manifest, SplitManifest, read_manifest
from embedcache.cache.shard import read_shard
from embedcache.cache.tokens import SplitTokens
from embedcache.errors import CacheError, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Block:
    """One block in memory. N is the rows in use; sequences are those of the block, in order.

    ``ids_N``, ``loss_mask_N``: tokens and targets. ``x_NH``: bfloat16 by tap. ``rows_S2``: first
    row and row past the last of each sequence, within the block. ``sequence_S``: their numbers in
    the split. ``document_S``: their documents. Quarantined sequences are left out of the S axes.
    """

    ids_N: Array
    loss_mask_N: Array
    x_NH: dict[str, torch.Tensor]
    rows_S2: Array
    sequence_S: Array
    document_S: Array


class SplitReader:
    """Reads one split of a cache."""

    def __init__(
        self, cache: Path, name: str, attributes: CacheAttributes, manifest: SplitManifest
    ):
        self.name = name
        self.manifest = manifest
        self.taps = attributes.settings.taps
        self._cache = cache
        self._rows = attributes.settings.block_tokens
        self._hidden = attributes.base["hidden_size"]
        self._codec = codec_for(name, attributes.settings.codec)
        self._tokens = SplitTokens(cache, name, self._rows)
        self._quarantined = np.array(manifest.quarantined, dtype=np.int64)

    def sequences(self, block: int) -> tuple[Array, Array, Array]:
        """Return (sequence_S, rows_S2, document_S) of a block's readable sequences."""
        first, stop = (int(v) for v in self._tokens.block_starts[block : block + 2])
        document = np.asarray(self._tokens.array("tokens/document")[first:stop]).astype(np.int64)
        sequence = np.arange(first, stop)
        keep = ~np.isin(sequence, self._quarantined)
        return sequence[keep], self._tokens.offsets(block)[keep], document[keep]

    def tokens(self, block: int) -> tuple[Array, Array]:
        """Return (ids_N, loss_mask_N) of a block; N is the rows in use."""
        start = block * self._rows
        rows = slice(start, start + self._tokens.block_rows(block))
        ids = np.asarray(self._tokens.array("tokens/ids")[rows]).astype(np.int64)
        return ids, np.asarray(self._tokens.array("tokens/loss_mask")[rows])

    def block(self, block: int, taps: tuple[str, ...] | None = None) -> Block:
        """Read and decode a block; ``taps`` defaults to all that are stored.

        Raises ``CacheError`` where a file is missing or of another size than the manifest states,
        or where a chunk fails its checksum.
        """
        self._check_files(block)
        rows = self._tokens.block_rows(block)
        try:
            ids_N, loss_mask_N = self.tokens(block)
            x_NH = {
                tap: self._codec.decode(
                    {spec.group: self._shard(spec, tap, block, rows) for spec in self._codec.arrays}
                )
                for tap in (self.taps if taps is None else taps)
            }
        except (ValueError, RuntimeError, OSError) as error:
            raise CacheError(
                f"block {block} of split '{self.name}' in {self._cache} is damaged ({error}). "
                "Extract into a new folder."
            ) from error
        sequence_S, rows_S2, document_S = self.sequences(block)
        return Block(ids_N, loss_mask_N, x_NH, rows_S2, sequence_S, document_S)

    def _shard(self, spec: ArraySpec, tap: str, block: int, rows: int) -> Array:
        columns = (self._hidden,) if spec.wide else ()
        size = chunk_rows(self._rows)
        return read_shard(
            self._cache / shard_name(f"{self.name}/{spec.group}/{tap}", block, 1 + spec.wide),
            rows=rows,
            columns=columns,
            dtype=spec.dtype,
            chunk_rows=size,
            chunks=self._rows // size,
        )

    def _check_files(self, block: int) -> None:
        for record in self.manifest.files[block]:
            path = self._cache / record.path
            size = path.stat().st_size if path.is_file() else None
            if size != record.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CacheError(
                    f"{path} {found}, expected {record.bytes} bytes: the cache is damaged. "
                    "Extract into a new folder."
                )

    @cached_property
    def documents(self) -> list[str]:
        """Names of the split's documents."""
        ends = self._tokens.table("documents/name_offsets").astype(np.int64)
        text = self._tokens.table("documents/name_bytes").tobytes()
        return [
            text[a:b].decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]


class Cache:
    """A finished cache: its attributes, manifest, splits and the base's head."""

    def __init__(self, path: Path):
        self.path = path
        self.attributes = read_attributes(path)
        self.manifest: Manifest = read_manifest(path)

    def split(self, name: str) -> SplitReader:
        """Return a split's reader; raises ``CacheError`` if it holds no sequence."""
        manifest = self.manifest.splits.get(name)
        if manifest is None or not manifest.sequences:
            filled = [key for key, split in self.manifest.splits.items() if split.sequences]
            raise CacheError(
                f"{self.path} has no '{name}' split (it has: {', '.join(filled)}). Splits are by "
                f"document: extract more documents, or give a corpus of its own with --{name}."
            )
        return SplitReader(self.path, name, self.attributes, manifest)

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
        return dict(zarr.open_group(self.path / "base" / "head", mode="r").attrs)  # type: ignore[arg-type]


def read_attributes(path: Path) -> CacheAttributes:
    """Read a cache's root attributes; raises ``CacheError`` if ``path`` is not a cache."""
    if not path.exists():
        raise CacheError(
            f"no such cache: {path}. Make one with: embedcache extract CORPUS --out {path}"
        )
    root = path / "zarr.json"
    try:
        group = zarr.open_group(path, mode="r") if root.is_file() else None
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CacheError(f"{root} is damaged ({error}): extract again") from error
    if group is None or ATTRIBUTE not in group.attrs:
        raise CacheError(f"{path} is not an embedcache cache: expected {root} with its attributes")
    value = group.attrs[ATTRIBUTE]
    if not isinstance(value, dict):
        raise CacheError(f"{root} holds damaged embedcache attributes: extract again")
    return CacheAttributes.from_dict(value, path=path)
