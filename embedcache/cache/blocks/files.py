"""The shards and the quarantined sequences of a split's blocks, and the digest tables of both.

``embeddings`` has a record for each shard, block by block, in the order of `block_shards`.
``quarantined`` has the numbers of the sequences that are never read, ascending.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.format.layout import DIGESTS, ExtractSettings, block_shards
from embedcache.cache.manifest.digest_table import DigestTable, TableDigest, write_digest_table
from embedcache.cache.manifest.file_record import FILE, FileRecord, packed, unpacked

Array = np.ndarray[Any, Any]
SEQUENCE = np.dtype("<u8")
BlockRecord = tuple[tuple[FileRecord, ...], tuple[int, ...]]
"""The records of a block's shards, and its quarantined sequences."""


class BlockFiles:
    """The records of a split's blocks, indexed by block.

    Reading a record raises ``CacheError`` if its page of the digest table is damaged.
    """

    def __init__(
        self,
        cache: Path,
        split: str,
        settings: ExtractSettings,
        embeddings: TableDigest,
        quarantined: TableDigest,
    ):
        self._split = split
        self._settings = settings
        self._each = len(block_shards(split, 0, settings))
        paths = (cache / name for name in block_digest_tables(split))
        self.embeddings = DigestTable(next(paths), FILE, embeddings)
        self.quarantined = DigestTable(next(paths), SEQUENCE, quarantined)

    def __len__(self) -> int:
        return len(self.embeddings) // self._each

    def __getitem__(self, block: int) -> tuple[FileRecord, ...]:
        """Return the records of a block's shards."""
        names = block_shards(self._split, block, self._settings)
        first = block * self._each
        return tuple(unpacked(self.embeddings[first + i], name) for i, name in enumerate(names))

    def __iter__(self) -> Iterator[tuple[FileRecord, ...]]:
        return (self[block] for block in range(len(self)))

    def quarantined_in(self, first: int, stop: int) -> Array:
        """Return the quarantined sequences in [first, stop), int64."""
        rows = range(bisect_left(self.quarantined, first), bisect_left(self.quarantined, stop))
        return np.array([int(self.quarantined[row]) for row in rows], np.int64)


def write_block_files(
    cache: Path, split: str, settings: ExtractSettings, blocks: Iterable[BlockRecord]
) -> tuple[TableDigest, TableDigest, int]:
    """Write both digest tables of a split, from its blocks in order.

    Returns (digest of ``embeddings``, digest of ``quarantined``, bytes of all shards).
    """
    sequences, size = array("Q"), 0

    def rows() -> Iterator[Any]:
        nonlocal size
        for block, (files, quarantined) in enumerate(blocks):
            sequences.extend(quarantined)
            by_path = {record.path: record for record in files}
            for name in block_shards(split, block, settings):
                size += by_path[name].bytes
                yield packed(by_path[name])

    paths = (cache / name for name in block_digest_tables(split))
    embeddings = write_digest_table(next(paths), FILE, rows())
    quarantined = write_digest_table(next(paths), SEQUENCE, sorted(sequences))
    return embeddings, quarantined, size


def block_digest_tables(split: str) -> tuple[str, str]:
    """Return the paths, inside the cache, of a split's tables of shards and of quarantine."""
    return f"{DIGESTS}/{split}/embeddings", f"{DIGESTS}/{split}/quarantined"
