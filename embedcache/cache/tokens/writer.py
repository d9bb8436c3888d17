"""Pass 0: tokens, masks and offsets, written before the base is loaded.

Whole sequences are packed into blocks of R rows in the order they come; memory holds one block a
split. Sealing fixes the number of blocks for good.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.format.arrays import checked, create_arrays
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    DIGESTS,
    ROWS,
    SEALED,
    SPLITS,
    CacheAttributes,
    block_arrays,
)
from embedcache.cache.manifest.digests import METADATA, publish_digests
from embedcache.cache.tokens.files import digest_tree
from embedcache.cache.tokens.tables import Table
from embedcache.errors import UsageError
from embedcache.store.files import fsync_path

Array = np.ndarray[Any, Any]


def create_rows(tokens: zarr.Group, *, rows: int, block_tokens: int) -> dict[str, Any]:
    """Create the arrays of one entry a token: ids, loss mask and spans, a chunk a block."""
    return {
        name.removeprefix("tokens/"): tokens.create_array(
            name.removeprefix("tokens/"),
            shape=(rows, *columns),
            chunks=(block_tokens, *columns),
            dtype=dtype,
            **checked("blosc", np.dtype(dtype).itemsize),
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
        fingerprint_F: Array,
        sequences: Sequence[tuple[Array, Array, Array]],
    ) -> None:
        """Append a document's sequences, each (ids [T], loss_mask [T], span [T, 2])."""
        encoded = np.frombuffer(name.encode(), dtype=np.uint8)
        self._name_end += len(encoded)
        self._index.extend(np.array([index]))
        self._fingerprint.extend(fingerprint_F[None])
        self._names.extend(encoded)
        self._name_offsets.extend(np.array([self._name_end]))
        for ids_T, mask_T, span_T in sequences:
            self._append(ids_T, mask_T, span_T)
        self._documents += 1

    def _append(self, ids_T: Array, mask_T: Array, span_T: Array) -> None:
        length = len(ids_T)
        if length > self._block_tokens:
            raise UsageError(
                f"a sequence of {length} tokens does not fit a block of {self._block_tokens}: "
                "give --block-tokens at least the --context"
            )
        if self._used + length > self._block_tokens:
            self._flush_block()
        rows = slice(self._used, self._used + length)
        for name, values in (("ids", ids_T), ("loss_mask", mask_T), ("span", span_T)):
            self._buffers[name][rows] = values
        first = self.blocks * self._block_tokens + self._used
        self._offsets.extend(np.array([[first, first + length]]))
        self._document.extend(np.array([self._documents]))
        self._used += length
        self.sequences += 1
        self.tokens += length
        self.targets += int(mask_T.sum())

    def _flush_block(self) -> None:
        for name, array in self._rows.items():
            array.append(self._buffers[name])
            self._buffers[name][:] = 0
        self.blocks += 1
        self._used = 0
        self._block_starts.extend(np.array([self.sequences]))

    def close(self) -> None:
        """Write what is left; the split is complete."""
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
    """Builds the sealed tokens of all splits in a staging folder, then moves them into place."""

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
        for sealer in self.splits.values():
            sealer.close()

    def seal(self, attributes: CacheAttributes, *, hidden: int) -> None:
        """Create the empty embedding arrays, make the seal and move all into place.

        Call after `close`. The root's ``zarr.json`` comes last: a cache without one has not been
        sealed, and pass 0 starts again. Where another process has cleared the staging folder away,
        ``FileNotFoundError`` is raised, and what that process makes is left alone.
        """
        settings = attributes.settings
        for name, sealer in self.splits.items():
            create_arrays(
                self._groups[name],
                block_arrays(name, settings),
                blocks=sealer.blocks,
                block_tokens=self._block_tokens,
                hidden=hidden,
            )
        self._root.attrs[ATTRIBUTE] = attributes.to_dict()
        fsync_tree(self._staging)
        publish_digests(self._staging, digest_tree(self._staging))
        for name in (*SPLITS, DIGESTS, SEALED, METADATA):
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
