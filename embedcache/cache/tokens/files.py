"""The files that pass 0 wrote of a split, and their ledger.

The ledger has a record for each chunk of each array, array by array; which and how many these are
follows from the arrays' metadata, which the seal holds verbatim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from embedcache.cache.format.layout import LEDGER, ROWS, SPLITS, TABLES, shard_name
from embedcache.cache.manifest.digest_table import Ledger, LedgerSeal, write_ledger
from embedcache.cache.manifest.digests import METADATA, Seal
from embedcache.cache.manifest.file_record import (
    FILE,
    FileRecord,
    fault_in,
    packed,
    record_file,
    unpacked,
)
from embedcache.cache.shards.errors import rewritten
from embedcache.errors import CacheError

SEALED_ARRAYS = {**ROWS, **TABLES}
"""What pass 0 writes of a split, in the order of its ledger."""


class SealedFiles:
    """The records of a split's sealed files, by array (its path under the split) and chunk.

    What reads a record raises ``CacheError`` where the ledger is damaged.
    """

    def __init__(self, cache: Path, split: str, seal: Seal):
        self._cache = cache
        self._split = split
        self.name = sealed_ledger(split)
        self.chunks = chunk_counts(split, seal.metadata)
        self.ledger = Ledger(cache / self.name, FILE, seal.ledgers[self.name])
        self._starts: dict[str, int] = {}
        rows = 0
        for array, count in self.chunks.items():
            self._starts[array] = rows
            rows += count

    def record(self, array: str, number: int) -> FileRecord:
        """Return the record of a chunk."""
        row = self.ledger[self._starts[array] + number]
        return unpacked(row, chunk_name(self._split, array, number))

    def record_over(self, staged: Path, array: str, number: int) -> FileRecord:
        """Return the record that a chunk has once what is ``staged`` is in place."""
        name = chunk_name(self._split, array, number)
        if (staged / name).is_file():
            return record_file(staged / name, name)
        return self.record(array, number)

    def check(self, array: str, number: int) -> None:
        """Raise ``CacheError`` unless a chunk's file is the one that was written."""
        record = self.record(array, number)
        if (fault := fault_in(self._cache, record)) is not None:
            raise rewritten(self._cache / record.path, fault)

    def tokens(self, block: int) -> tuple[FileRecord, ...]:
        """Return the records of a block's ids, loss mask and spans."""
        return tuple(self.record(array, block) for array in ROWS)

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(int(row["bytes"]) for row in self.ledger)

    def records(self) -> Iterator[tuple[str, FileRecord | None]]:
        """Yield every file with its record, None where the ledger is damaged there."""
        for array, count in self.chunks.items():
            for number in range(count):
                try:
                    record = self.record(array, number)
                except CacheError:
                    record = None
                yield chunk_name(self._split, array, number), record


def sealed_ledger(split: str) -> str:
    """Return the path, inside the cache, of the ledger of what pass 0 wrote of a split."""
    return f"{LEDGER}/{split}/sealed"


def chunk_counts(split: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Return how many chunks each array of a split has, by the ``zarr.json`` of each."""
    counts = {}
    for array in SEALED_ARRAYS:
        told = json.loads(metadata[f"{split}/{array}/{METADATA}"])
        rows = told["chunk_grid"]["configuration"]["chunk_shape"][0]
        counts[array] = -(-told["shape"][0] // rows)
    return counts


def chunk_name(split: str, array: str, number: int) -> str:
    """Return the path, inside the cache, of a chunk's file.

    >>> chunk_name("train", "tokens/offsets", 2)
    'train/tokens/offsets/c/2/0'
    """
    return shard_name(f"{split}/{array}", number, 1 + len(SEALED_ARRAYS[array][1]))


def write_sealed_ledger(
    root: Path,
    split: str,
    metadata: Mapping[str, str],
    *,
    into: Path | None = None,
    record: Callable[[str, int], FileRecord] | None = None,
) -> LedgerSeal:
    """Write the ledger of what pass 0 wrote of a split; return its seal.

    Args:
        root: the cache, or where it is staged.
        split: the split's name.
        metadata: every ``zarr.json``, by path.
        into: the cache that the ledger goes into, if not ``root``.
        record: gives the record of an array's chunk; taken from the file itself otherwise.

    Raises:
        FileNotFoundError: for a file that should be there.
    """

    def of_file(array: str, number: int) -> FileRecord:
        name = chunk_name(split, array, number)
        return record_file(root / name, name)

    counts = chunk_counts(split, metadata)
    rows = (
        packed((record or of_file)(array, number))
        for array, count in counts.items()
        for number in range(count)
    )
    return write_ledger((into or root) / sealed_ledger(split), FILE, rows)


def seal_tree(root: Path) -> Seal:
    """Write the ledgers of all that pass 0 wrote in ``root``; return the seal of it."""
    metadata = metadata_in(root)
    ledgers = {sealed_ledger(split): write_sealed_ledger(root, split, metadata) for split in SPLITS}
    return Seal(files=(), metadata=metadata, ledgers=ledgers)


def seal_over(cache: Path, staged: Path, old: Seal) -> tuple[Seal, list[str]]:
    """Write, in ``staged``, the ledgers of what pass 0 wrote as it is once ``staged`` is in place.

    A split of which nothing is staged keeps its own. Returns the seal of it all, and the files that
    are then of no array.
    """
    metadata = old.metadata | metadata_in(staged)
    ledgers, gone = dict(old.ledgers), []
    for split in SPLITS:
        if not (staged / split).is_dir():
            continue
        before, after = SealedFiles(cache, split, old), chunk_counts(split, metadata)
        ledgers[before.name] = write_sealed_ledger(
            staged, split, metadata, record=partial(before.record_over, staged)
        )
        gone += [
            chunk_name(split, array, number)
            for array, count in before.chunks.items()
            for number in range(after[array], count)
        ]
    return Seal(files=(), metadata=metadata, ledgers=ledgers), gone


def metadata_in(root: Path) -> dict[str, str]:
    """Return every ``zarr.json`` of the root and the splits, by path; no chunk is looked at."""
    found = {METADATA: (root / METADATA).read_bytes().decode()}
    for split in SPLITS:
        for at, folders, names in os.walk(root / split):
            if METADATA in names:
                path = Path(at) / METADATA
                found[path.relative_to(root).as_posix()] = path.read_bytes().decode()
            folders[:] = sorted(name for name in folders if name != "c")
    return found
