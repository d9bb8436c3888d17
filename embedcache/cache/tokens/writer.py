"""Writing tokens, masks and offsets: pass 0, which needs no base.

Whole sequences are packed into blocks in the order in which they come; memory holds one block a
split. Publishing the tokens fixes the number of blocks.

Axes: T tokens of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.format.arrays import create_arrays, zarr_codecs
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    DIGESTS,
    ROWS,
    SPLITS,
    TOKENS_DIGESTS,
    CacheAttributes,
    block_arrays,
)
from embedcache.cache.manifest.digests import METADATA, publish_digests
from embedcache.cache.tokens.files import write_tokens_digests
from embedcache.cache.tokens.tables import Table
from embedcache.errors import UsageError
from embedcache.store.files import fsync_path

Array = np.ndarray[Any, Any]


def create_rows(tokens: zarr.Group, *, rows: int, block_tokens: int) -> dict[str, Any]:
    """Create the arrays with one entry a token: ids, loss mask and spans; one chunk a block."""
    return {
        name.removeprefix("tokens/"): tokens.create_array(
            name.removeprefix("tokens/"),
            shape=(rows, *columns),
            chunks=(block_tokens, *columns),
            dtype=dtype,
            **zarr_codecs("blosc", np.dtype(dtype).itemsize),
        )
        for name, (dtype, columns) in ROWS.items()
    }


class SplitTokensWriter:
    """Writes one split's tokens; `append` sequences in order, then `close`."""

    def __init__(self, group: zarr.Group, block_tokens: int):
        self.blocks = 0
        self.sequences = 0
        self.tokens = 0
        self.targets = 0
        self._group = group
        self._block_tokens = block_tokens
        self._used = 0
        tokens = group.create_group("tokens")
        group.create_group("documents")
        self._rows = create_rows(tokens, rows=0, block_tokens=block_tokens)
        self._buffers = {
            name: np.zeros((block_tokens, *array.shape[1:]), dtype=array.dtype)
            for name, array in self._rows.items()
        }
        self._offsets = Table(group, "tokens/offsets")
        self._document = Table(group, "tokens/document")
        self._block_starts = Table(group, "tokens/blocks")
        self._index = Table(group, "documents/index")
        self._fingerprint = Table(group, "documents/fingerprint")
        self._names = Table(group, "documents/name_bytes")
        self._name_offsets = Table(group, "documents/name_offsets")
        self._documents = 0
        self._name_end = 0
        self._block_starts.extend(np.array([0]))
        self._name_offsets.extend(np.array([0]))

    def append_document(
        self,
        index: int,
        name: str,
        fingerprint: Array,
        sequences: Sequence[tuple[Array, Array, Array]],
    ) -> None:
        """Append a document's sequences.

        Args:
            index: its number in the corpus.
            name: its name.
            fingerprint: uint8 [FINGERPRINT_BYTES].
            sequences: (ids_T, loss_mask_T, span_T2) of each.
        """
        encoded = np.frombuffer(name.encode(), dtype=np.uint8)
        self._name_end += len(encoded)
        self._index.extend(np.array([index]))
        self._fingerprint.extend(fingerprint[None])
        self._names.extend(encoded)
        self._name_offsets.extend(np.array([self._name_end]))
        for ids_T, loss_mask_T, span_T2 in sequences:
            self._append(ids_T, loss_mask_T, span_T2)
        self._documents += 1

    def _append(self, ids_T: Array, loss_mask_T: Array, span_T2: Array) -> None:
        length = len(ids_T)
        if length > self._block_tokens:
            raise UsageError(
                f"`block_tokens=` expects at least the tokens of a sequence, here {length}; found "
                f"{self._block_tokens}"
            )
        if self._used + length > self._block_tokens:
            self._flush_block()
        rows = slice(self._used, self._used + length)
        for name, values in (("ids", ids_T), ("loss_mask", loss_mask_T), ("span", span_T2)):
            self._buffers[name][rows] = values
        first = self.blocks * self._block_tokens + self._used
        self._offsets.extend(np.array([[first, first + length]]))
        self._document.extend(np.array([self._documents]))
        self._used += length
        self.sequences += 1
        self.tokens += length
        self.targets += int(loss_mask_T.sum())

    def _flush_block(self) -> None:
        for name, array in self._rows.items():
            array.append(self._buffers[name])
            self._buffers[name][:] = 0
        self.blocks += 1
        self._used = 0
        self._block_starts.extend(np.array([self.sequences]))

    def close(self) -> None:
        """Write pending rows; the split is complete."""
        if self._used:
            self._flush_block()
        for table in (
            self._offsets,
            self._document,
            self._block_starts,
            self._index,
            self._fingerprint,
            self._names,
            self._name_offsets,
        ):
            table.flush()
        self._group.attrs[ATTRIBUTE] = {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "targets": self.targets,
            "documents": self._documents,
        }


class TokensWriter:
    """Writes the tokens of all splits into a staging folder, then moves them into the cache."""

    def __init__(self, cache: Path, staging: Path, block_tokens: int):
        self._cache = cache
        self._staging = staging
        self._block_tokens = block_tokens
        self._root = zarr.create_group(staging, zarr_format=3)
        self._groups = {name: self._root.create_group(name) for name in SPLITS}
        self.splits = {
            name: SplitTokensWriter(group, block_tokens) for name, group in self._groups.items()
        }

    def close(self) -> None:
        """Flush every split, so that its counts of blocks and tokens are final."""
        for split in self.splits.values():
            split.close()

    def publish(self, attributes: CacheAttributes, *, hidden: int) -> None:
        """Create the empty arrays of embeddings, write the digests and move all into the cache.

        Call after `close`. The root's ``zarr.json`` comes last: in a cache without one, pass 0
        starts again.

        Raises:
            FileNotFoundError: another process has removed the staging folder.
        """
        settings = attributes.settings
        for name, split in self.splits.items():
            create_arrays(
                self._groups[name],
                block_arrays(name, settings),
                blocks=split.blocks,
                block_tokens=self._block_tokens,
                hidden=hidden,
            )
        self._root.attrs[ATTRIBUTE] = attributes.to_dict()
        fsync_tree(self._staging)
        publish_digests(self._staging, write_tokens_digests(self._staging))
        for name in (*SPLITS, DIGESTS, TOKENS_DIGESTS, METADATA):
            fsync_path(self._cache)
            (self._staging / name).rename(self._cache / name)
        fsync_path(self._cache)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder under ``root`` to the disk."""
    with os.scandir(root) as entries:  # one at a time: a folder may hold a million
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                fsync_tree(Path(entry))
            else:
                fsync_path(Path(entry))
    fsync_path(root)
