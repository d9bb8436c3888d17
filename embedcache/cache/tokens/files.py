"""The files that tokenising (pass 0) writes for a split, and their digest table.

The digest table has one record per chunk, ordered by array, then by chunk number. The number of
chunks of an array follows from its ``zarr.json``, which `Digests.metadata` holds verbatim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from embedcache.cache.format.layout import DIGESTS, ROWS, SPLITS, TABLES, shard_name
from embedcache.cache.manifest.digest_table import DigestTable, TableDigest, write_digest_table
from embedcache.cache.manifest.digests import METADATA, Digests
from embedcache.cache.manifest.file_record import (
    FILE,
    FileRecord,
    fault_in,
    packed,
    record_file,
    unpacked,
)
from embedcache.cache.shards.errors import changed_error
from embedcache.errors import CacheError

TOKEN_ARRAYS = {**ROWS, **TABLES}
"""The arrays that pass 0 writes for a split, in the order of the digest table."""


class TokenFiles:
    """The file records of a split's tokens and documents, by array and chunk number.

    An array is named by its path inside the split, such as ``tokens/ids``.

    Reading a record raises ``CacheError`` if its page of the digest table is damaged.
    """

    def __init__(self, cache: Path, split: str, digests: Digests):
        self._cache = cache
        self._split = split
        self.name = tokens_digest_table(split)
        self.chunks = chunk_counts(split, digests.metadata)
        self.digest_table = DigestTable(cache / self.name, FILE, digests.digest_tables[self.name])
        self._starts: dict[str, int] = {}
        rows = 0
        for array, count in self.chunks.items():
            self._starts[array] = rows
            rows += count

    def record(self, array: str, number: int) -> FileRecord:
        """Return the record of a chunk."""
        row = self.digest_table[self._starts[array] + number]
        return unpacked(row, chunk_name(self._split, array, number))

    def record_after(self, staged: Path, array: str, number: int) -> FileRecord:
        """Return the record of a chunk's file in ``staged``, else in the cache."""
        name = chunk_name(self._split, array, number)
        if (staged / name).is_file():
            return record_file(staged / name, name)
        return self.record(array, number)

    def check(self, array: str, number: int) -> None:
        """Raise ``CacheError`` unless a chunk's file matches its record."""
        record = self.record(array, number)
        if (fault := fault_in(self._cache, record)) is not None:
            raise changed_error(self._cache / record.path, fault)

    def tokens(self, block: int) -> tuple[FileRecord, ...]:
        """Return the records of a block's ids, loss mask and spans."""
        return tuple(self.record(array, block) for array in ROWS)

    @property
    def bytes(self) -> int:
        """Total size of the split's token and document files, in bytes."""
        return sum(int(row["bytes"]) for row in self.digest_table)

    def records(self) -> Iterator[tuple[str, FileRecord | None]]:
        """Yield every file's path and its record, or None if the digest table is damaged."""
        for array, count in self.chunks.items():
            for number in range(count):
                try:
                    record = self.record(array, number)
                except CacheError:
                    record = None
                yield chunk_name(self._split, array, number), record


def tokens_digest_table(split: str) -> str:
    """Return the path, inside the cache, of the digest table of a split's tokens and documents."""
    return f"{DIGESTS}/{split}/tokens"


def chunk_counts(split: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Return the number of chunks of each array of a split, from ``zarr.json`` texts by path."""
    counts = {}
    for array in TOKEN_ARRAYS:
        array_metadata = json.loads(metadata[f"{split}/{array}/{METADATA}"])
        rows = array_metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        counts[array] = -(-array_metadata["shape"][0] // rows)
    return counts


def chunk_name(split: str, array: str, number: int) -> str:
    """Return the path, inside the cache, of a chunk's file.

    >>> chunk_name("train", "tokens/offsets", 2)
    'train/tokens/offsets/c/2/0'
    """
    return shard_name(f"{split}/{array}", number, 1 + len(TOKEN_ARRAYS[array][1]))


def write_tokens_digest_table(
    root: Path,
    split: str,
    metadata: Mapping[str, str],
    *,
    into: Path | None = None,
    record: Callable[[str, int], FileRecord] | None = None,
) -> TableDigest:
    """Write the digest table of a split's tokens and documents; return its digest.

    Args:
        root: the folder with the chunk files: the cache or a staging folder.
        split: the split's name.
        metadata: the text of every ``zarr.json``, by path inside the cache.
        into: the folder to write the digest table to; ``root`` if None.
        record: a function of array and chunk number that returns the record; if None, the record
            is computed from the file.

    Raises:
        FileNotFoundError: a file is missing.
    """

    def record_of_chunk(array: str, number: int) -> FileRecord:
        name = chunk_name(split, array, number)
        return record_file(root / name, name)

    counts = chunk_counts(split, metadata)
    rows = (
        packed((record or record_of_chunk)(array, number))
        for array, count in counts.items()
        for number in range(count)
    )
    return write_digest_table((into or root) / tokens_digest_table(split), FILE, rows)


def write_tokens_digests(root: Path) -> Digests:
    """Write the digest tables of both splits in ``root`` after pass 0; return the digests."""
    metadata = metadata_in(root)
    digest_tables = {
        tokens_digest_table(split): write_tokens_digest_table(root, split, metadata)
        for split in SPLITS
    }
    return Digests(files=(), metadata=metadata, digest_tables=digest_tables)


def write_changed_digests(cache: Path, staged: Path, old: Digests) -> tuple[Digests, list[str]]:
    """Write to ``staged`` the digest tables of the cache as it will be with the staged files.

    A split without staged files keeps its digest table. Returns the new digests, and the paths of
    the chunk files that no array uses any more.
    """
    metadata = old.metadata | metadata_in(staged)
    digest_tables, unused = dict(old.digest_tables), []
    for split in SPLITS:
        if not (staged / split).is_dir():
            continue
        before, after = TokenFiles(cache, split, old), chunk_counts(split, metadata)
        digest_tables[before.name] = write_tokens_digest_table(
            staged, split, metadata, record=partial(before.record_after, staged)
        )
        unused += [
            chunk_name(split, array, number)
            for array, count in before.chunks.items()
            for number in range(after[array], count)
        ]
    return Digests(files=(), metadata=metadata, digest_tables=digest_tables), unused


def metadata_in(root: Path) -> dict[str, str]:
    """Return the text of every ``zarr.json`` of the root and the splits, by path inside ``root``.

    Chunk folders, named ``c``, are skipped.
    """
    found = {METADATA: (root / METADATA).read_bytes().decode()}
    for split in SPLITS:
        for at, folders, names in os.walk(root / split):
            if METADATA in names:
                path = Path(at) / METADATA
                found[path.relative_to(root).as_posix()] = path.read_bytes().decode()
            folders[:] = sorted(name for name in folders if name != "c")
    return found
