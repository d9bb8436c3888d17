"""Verifying the blocks of a cache: commit markers, shards, quarantined sequences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedcache.cache.blocks.commit import Marker, committed_blocks
from embedcache.cache.blocks.files import BlockFiles
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import (
    MANIFEST,
    SPLITS,
    CacheAttributes,
    block_shards,
    marker_path,
)
from embedcache.cache.manifest.file_record import FileRecord, content_fault, fault_in
from embedcache.cache.shards.shard import read_shard
from embedcache.errors import CacheError
from embedcache.progress import Bar, Progress
from embedcache.store.files import STAGING

Kind = Literal[
    "manifest", "digests", "digest_table", "metadata", "tokens", "base", "codec", "marker", "shard"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One damaged file.

    Attributes:
        kind: what the file is for; ``tokens`` includes documents, ``digests`` is ``tokens.json``.
        file: its path inside the cache.
        why: what is wrong with it; the file's path and this make a sentence.
        split: the split of the block that it belongs to, if any.
        block: that block's number.
    """

    kind: Kind
    file: str
    why: str
    split: str | None = None
    block: int | None = None

    def __str__(self) -> str:
        where = "" if self.split is None else f"{self.split} block {self.block}: "
        return f"{where}{self.file} {self.why}"


class BlockVerifier:
    """Verifies the blocks of one cache.

    Args:
        cache: the cache's folder.
        deep: read every byte; else compare sizes and the checksums at the ends of chunks.
        attributes: the root attributes, as they were written.
        counts: the number of blocks, by split.
        records: by split, the records of the manifest; empty if there is no sound manifest.
        markers: by split, the newest marker of each block (`markers_of`).
    """

    def __init__(
        self,
        cache: Path,
        deep: bool,
        attributes: CacheAttributes,
        counts: Mapping[str, int],
        records: Mapping[str, BlockFiles],
        markers: Mapping[str, Mapping[int, Path]],
    ):
        self.files = 0
        self.bytes = 0
        self._cache = cache
        self._deep = deep
        self._attributes = attributes
        self._counts = counts
        self._records = records
        self._markers = markers
        self._complete = (cache / MANIFEST).is_file()

    def run(self, progress: Progress) -> list[Fault]:
        """Verify every block; return the faults."""
        faults: list[Fault] = []
        threads = min(8, os.cpu_count() or 1) if self._deep else 1
        todo = [(name, block) for name, count in self._counts.items() for block in range(count)]
        title = "reading every byte" if self._deep else "comparing sizes"
        with progress.bar(title, len(todo), "blocks") as bar, ThreadPoolExecutor(threads) as pool:
            for found in pool.map(lambda item: self._check_block(item[0], item[1], bar), todo):
                faults += found
        for name, count in self._counts.items():
            faults += self._check_quarantined(name)
            for block, path in self._markers[name].items():
                if block >= count:
                    why = f"belongs to no block: '{name}' has {count}"
                    faults.append(Fault(kind="marker", file=self._name(path), why=why))
        return faults

    def _name(self, path: Path) -> str:
        return path.relative_to(self._cache).as_posix()

    def _check_block(self, split: str, block: int, bar: Bar) -> list[Fault]:
        """Return the faults of a block's marker and shards."""
        path = self._markers[split].get(block)
        records: tuple[FileRecord, ...] | None = None
        if split in self._records:
            with suppress(CacheError):  # a damaged digest table is reported; use the marker's files
                records = self._records[split][block]
        elif path is None and not self._complete:
            bar.advance(1)
            return []  # not computed yet
        where = path or marker_path(self._cache, split, block)
        marker, why = _read_marker(where, split, block)
        if marker is not None and records is not None and {*marker.files} != {*records}:
            why = f"does not name the files that {MANIFEST} names"
        found: list[tuple[Kind, str, str | None]] = [("marker", self._name(where), why)]
        if records is None and marker is not None:
            records = marker.files
        for record in records or ():
            self.files += 1
            self.bytes += record.bytes
            found.append(("shard", record.path, self._shard_fault(split, block, record, marker)))
        bar.advance(1)
        return [
            Fault(kind=kind, file=file, why=why, split=split, block=block)
            for kind, file, why in found
            if why is not None
        ]

    def _shard_fault(
        self, split: str, block: int, record: FileRecord, marker: Marker | None
    ) -> str | None:
        """Return what is wrong with a shard, or None; it may still be in its attempt's staging."""
        rows = self._attributes.settings.block_tokens
        spec = block_shards(split, block, self._attributes.settings).get(record.path)
        if spec is None:
            codec = self._attributes.settings.codec
            return f"is no file of this cache's codec '{codec}' and taps"
        root = self._cache
        if marker is not None and not (root / record.path).is_file():
            staged = self._cache / STAGING / marker.attempt
            root = staged if (staged / record.path).is_file() else root
        why = fault_in(root, record, chunks=rows // chunk_rows(spec, rows))
        if why is None and self._deep:
            why = content_fault(root, record) or self._decoding_fault(root / record.path, spec)
        return why

    def _decoding_fault(self, path: Path, spec: ArraySpec) -> str | None:
        rows = self._attributes.settings.block_tokens
        try:
            read_shard(
                path,
                rows=rows,
                columns=spec.columns(self._attributes.base["hidden_size"]),
                dtype=spec.dtype,
                chunk_rows=chunk_rows(spec, rows),
                chunks=rows // chunk_rows(spec, rows),
                coder=CODERS[spec.coder],
            )
        except CacheError as error:
            return f"does not decode ({error})"
        return None

    def _check_quarantined(self, split: str) -> list[Fault]:
        """Compare the manifest's quarantined sequences with those of the undamaged markers."""
        if split not in self._records:
            return []
        try:
            expected = {int(sequence) for sequence in self._records[split].quarantined}
        except CacheError:
            return []  # a damaged digest table is reported
        faults: list[Fault] = []
        found: set[int] = set()
        for block, path in self._markers[split].items():
            marker, _ = _read_marker(path, split, block)
            if marker is None:
                return []  # reported; which sequences it quarantined is unknown
            found |= set(marker.quarantined)
            if not set(marker.quarantined) <= expected:
                why = f"quarantines sequences that {MANIFEST} does not"
                faults.append(
                    Fault(kind="marker", file=self._name(path), why=why, split=split, block=block)
                )
        if expected - found and len(self._markers[split]) == self._counts[split]:
            why = f"quarantines '{split}' sequences that no marker does"
            faults.append(Fault(kind="manifest", file=MANIFEST, why=why))
        return faults


def markers_of(cache: Path) -> dict[str, dict[int, Path]]:
    """Return, by split, the newest marker of each committed block."""
    return {name: committed_blocks(cache, name) for name in SPLITS}


def brief(error: ValueError | OSError) -> str:
    """Return why a file cannot be read or parsed, to follow its name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return "is no text" if isinstance(error, UnicodeDecodeError) else str(error)


def _read_marker(path: Path, split: str, block: int) -> tuple[Marker | None, str | None]:
    """Return a marker, or what is wrong with it."""
    if not path.is_file():
        return None, "is missing"
    try:
        marker = Marker.parse(path.read_bytes().decode())
    except (ValueError, OSError) as error:
        return None, brief(error)
    name = f"{marker.block:08d}.{marker.generation}.json"
    if (marker.split, name) != (split, path.name):
        return None, f"is the marker of {marker.split} block {marker.block}, moved"
    return marker, None
