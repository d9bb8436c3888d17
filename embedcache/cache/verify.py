"""Holding a cache's files against what was recorded when they were written.

Whatever vouches for a file is itself checked first: the manifest, the seal and every marker carry
their own SHA-256. Nothing is written, so a cache on a read-only disk can be verified, too. No lock
is taken: where a cache changes under the look, what does not match may only be on its way.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from embedcache.cache.activity import require_quiet, state_of
from embedcache.cache.blocks.commit import Marker, committed_blocks
from embedcache.cache.blocks.files import BlockFiles, block_digest_tables
from embedcache.cache.cache import read_attributes
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    MANIFEST,
    SEALED,
    SPLITS,
    STAGING,
    CacheAttributes,
    block_shards,
    marker_path,
    parts_of,
)
from embedcache.cache.manifest.digest_table import DigestTable
from embedcache.cache.manifest.digests import METADATA, Digests, metadata_fault
from embedcache.cache.manifest.file_record import FileRecord, content_fault, fault_in
from embedcache.cache.manifest.manifest import Manifest
from embedcache.cache.shards.shard import read_shard
from embedcache.cache.tokens.files import TokenFiles
from embedcache.errors import CacheError
from embedcache.progress import SILENT, Bar, Progress
from embedcache.store.lease import writers_of

Kind = Literal[
    "manifest", "seal", "digest_table", "metadata", "sealed", "base", "codec", "marker", "shard"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One damaged file: its path inside the cache, why, and whose it is.

    ``kind`` is what the file is for: a ``sealed`` one holds tokens or documents.
    """

    kind: Kind
    file: str
    why: str
    split: str | None = None
    block: int | None = None

    def __str__(self) -> str:
        whose = "" if self.split is None else f"{self.split} block {self.block}: "
        return f"{whose}{self.file} {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found. ``blocks`` are planned, ``committed`` have a marker; bytes of checked files.

    ``complete`` says that a manifest is there; without one only committed blocks are checked.
    ``writers`` are the processes at work on it, ``parts`` the sources of each cache that it was
    merged from.
    """

    cache: str
    complete: bool
    deep: bool
    blocks: int
    committed: int
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    writers: tuple[str, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()


def verify(cache: Path, *, deep: bool = False, progress: Progress = SILENT) -> Verification:
    """Find every damaged file of a cache, as `look_at` does, which others may be writing.

    Raises ``CacheError`` for what is no cache, one of a newer schema, one of which documents are
    being deleted or added, or one in which not all matches while others write: no damage yet.
    """
    while True:
        before = state_of(cache)
        try:
            found = look_at(cache, deep=deep, progress=progress)
        except CacheError as error:
            require_quiet(cache, error)
            raise
        if not found.faults:
            return replace(found, writers=tuple(map(str, writers_of(cache))))
        require_quiet(cache, found.faults[0])
        if before == state_of(cache):
            return found


def look_at(cache: Path, *, deep: bool = False, progress: Progress = SILENT) -> Verification:
    """Find every damaged file of a cache that nobody else writes.

    Without ``deep``, metadata, tokens, documents and what is kept of the base are held to their
    content, shards of embeddings to their size and the checksums at their chunks' ends. With it,
    every byte is read: each shard's SHA-256 is compared, and each chunk decoded.

    Raises ``CacheError`` for what is no cache, or one of a newer schema.
    """
    if not any((cache / name).is_file() for name in (METADATA, MANIFEST, SEALED)):
        read_attributes(cache)  # says what is missing
    return _Verifier(cache, deep).run(progress)


class _Verifier:
    """One look at one cache; ``faults`` fills as it goes."""

    def __init__(self, cache: Path, deep: bool):
        self._cache = cache
        self._deep = deep
        self._faults: list[Fault] = []
        self._markers = {name: committed_blocks(cache, name) for name in SPLITS}
        self._manifest = self._read_manifest()
        self._seal = self._read_seal()
        self._block_files: dict[str, BlockFiles] = {}
        self._files = 0
        self._bytes = 0

    def run(self, progress: Progress) -> Verification:
        blocks = 0
        if self._seal is None:
            read_attributes(self._cache)  # a cache of a newer schema is told so
        else:
            self._check_seal(self._seal, "sealed")
            self._check_sealed_files(self._seal)
            if self._manifest is not None:
                self._open_block_files(self._manifest)
                self._check_seal(self._manifest.base, "base")
                self._check_seal(self._manifest.codec, "codec")
            counts = {name: self._block_count(name) for name in SPLITS}
            blocks = sum(counts.values())
            self._check_blocks(counts, progress)
        committed = sum(len(found) for found in self._markers.values())
        complete = (self._cache / MANIFEST).is_file()
        if not complete and committed == blocks > 0:
            self._add("manifest", MANIFEST, f"is missing, and all {blocks} blocks are committed")
        return Verification(
            cache=str(self._cache),
            complete=complete,
            deep=self._deep,
            blocks=blocks,
            committed=committed,
            files=self._files,
            bytes=self._bytes,
            faults=tuple(self._faults),
            parts=() if self._seal is None else parts_of(self._attributes.corpus),
        )

    def _add(self, kind: Kind, file: str, why: str) -> None:
        self._faults.append(Fault(kind=kind, file=file, why=why))

    def _read_manifest(self) -> Manifest | None:
        """Return the manifest where its content can be trusted."""
        path = self._cache / MANIFEST
        if not path.is_file():
            return None
        try:
            text = path.read_bytes().decode()
            manifest = Manifest.parse(text)
        except (ValueError, OSError) as error:
            self._add("manifest", MANIFEST, _brief(error))
            return None
        if manifest.to_text() != text:
            self._add("manifest", MANIFEST, "does not match its own SHA-256: it was edited")
        return manifest

    def _read_seal(self) -> Digests | None:
        """Return the seal of pass 0: the manifest's, where that can be trusted, else the file's."""
        sealed = None if self._manifest is None else self._manifest.sealed
        path = self._cache / SEALED
        if not path.is_file():
            self._add("seal", SEALED, "is missing")
            return sealed
        try:
            found = Digests.parse(path.read_bytes().decode())
        except (ValueError, OSError) as error:
            self._add("seal", SEALED, _brief(error))
            return sealed
        if sealed is not None and found != sealed:
            self._add("seal", SEALED, f"does not name the files that {MANIFEST} names")
        return sealed or found

    def _check_seal(self, seal: Digests, kind: Literal["sealed", "base", "codec"]) -> None:
        for name, text in seal.metadata.items():
            self._files += 1
            self._bytes += len(text)
            if (why := metadata_fault(self._cache / name, text)) is not None:
                self._add("metadata" if kind == "sealed" else kind, name, why)
        for record in seal.files:
            self._check_file(record, kind)

    def _check_sealed_files(self, seal: Digests) -> None:
        """Check the digest tables of pass 0, and each file that they vouch for."""
        for split in SPLITS:
            sealed = TokenFiles(self._cache, split, seal)
            self._check_ledger(sealed.digest_table, sealed.name)
            for record in filter(None, (record for _, record in sealed.records())):
                self._check_file(record, "sealed")

    def _open_block_files(self, manifest: Manifest) -> None:
        """Check the digest tables of the blocks."""
        for name, split in manifest.splits.items():
            found = split.files(self._cache, name, self._attributes.settings)
            self._block_files[name] = found
            digest_tables = (found.embeddings, found.quarantined)
            for digest_table, path in zip(digest_tables, block_digest_tables(name), strict=True):
                self._check_ledger(digest_table, path)

    def _check_ledger(self, digest_table: DigestTable, name: str) -> None:
        self._files += bool(len(digest_table))
        self._bytes += digest_table.size
        if (why := digest_table.fault()) is not None:
            self._add("digest_table", name, why)

    def _check_file(self, record: FileRecord, kind: Kind) -> None:
        self._files += 1
        self._bytes += record.bytes
        why = fault_in(self._cache, record) or content_fault(self._cache, record)
        if why is not None:
            self._add(kind, record.path, why)

    @cached_property
    def _attributes(self) -> CacheAttributes:
        """The root attributes as they were sealed, whatever the root says by now."""
        assert self._seal is not None
        value = json.loads(self._seal.metadata[METADATA])["attributes"][ATTRIBUTE]
        return CacheAttributes.from_dict(value, path=self._cache)

    def _block_count(self, split: str) -> int:
        assert self._seal is not None
        ids = json.loads(self._seal.metadata[f"{split}/tokens/ids/{METADATA}"])
        return int(ids["shape"][0]) // self._attributes.settings.block_tokens

    def _check_blocks(self, counts: dict[str, int], progress: Progress) -> None:
        threads = min(8, os.cpu_count() or 1) if self._deep else 1
        todo = [(name, block) for name, count in counts.items() for block in range(count)]
        title = "reading every byte" if self._deep else "comparing sizes"
        with progress.bar(title, len(todo), "blocks") as bar, ThreadPoolExecutor(threads) as pool:
            for faults in pool.map(lambda item: self._check_block(item[0], item[1], bar), todo):
                self._faults += faults
        for name, count in counts.items():
            self._check_quarantined(name)
            for block, path in self._markers[name].items():
                if block >= count:
                    where = path.relative_to(self._cache).as_posix()
                    self._add("marker", where, f"is of no block: '{name}' has {count}")

    def _check_block(self, split: str, block: int, bar: Bar) -> list[Fault]:
        """Return the faults of one block: its marker, then its shards."""
        path = self._markers[split].get(block)
        records: tuple[FileRecord, ...] | None = None
        if split in self._block_files:
            with suppress(CacheError):  # a damaged digest table is told; the marker says the same
                records = self._block_files[split][block]
        elif path is None and not (self._cache / MANIFEST).is_file():
            bar.advance(1)
            return []  # not computed yet
        where = path or marker_path(self._cache, split, block)
        marker, why = _read_marker(where, split, block)
        if marker is not None and records is not None and {*marker.files} != {*records}:
            why = f"does not name the files that {MANIFEST} names"
        named = (where.relative_to(self._cache).as_posix(), "marker", why)
        found: list[tuple[str, Kind, str | None]] = [named]  # type: ignore[list-item]
        if records is None and marker is not None:
            records = marker.files
        for record in records or ():
            self._files += 1
            self._bytes += record.bytes
            found.append((record.path, "shard", self._shard_fault(split, block, record, marker)))
        bar.advance(1)
        return [
            Fault(kind=kind, file=file, why=why, split=split, block=block)
            for file, kind, why in found
            if why is not None
        ]

    def _shard_fault(
        self, split: str, block: int, record: FileRecord, marker: Marker | None
    ) -> str | None:
        """Return what is wrong with a shard, which may still lie where its attempt staged it."""
        rows = self._attributes.settings.block_tokens
        spec = block_shards(split, block, self._attributes.settings).get(record.path)
        if spec is None:
            codec = self._attributes.settings.codec
            return f"is no file of this cache's codec '{codec}' and taps"
        chunks = rows // chunk_rows(spec, rows)
        root = self._cache
        staged = None if marker is None else self._cache / STAGING / marker.attempt
        if staged is not None and not (root / record.path).is_file():
            root = staged if (staged / record.path).is_file() else root
        if (why := fault_in(root, record, chunks=chunks)) is not None or not self._deep:
            return why
        if (why := content_fault(root, record)) is not None:
            return why
        return self._decoding_fault(root / record.path, spec)

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

    def _check_quarantined(self, split: str) -> None:
        """Hold the manifest's quarantined sequences against those of the sound markers."""
        if split not in self._block_files:
            return
        try:
            stated = {int(sequence) for sequence in self._block_files[split].quarantined}
        except CacheError:
            return  # a damaged digest table is told
        found: set[int] = set()
        for block, path in self._markers[split].items():
            marker, _ = _read_marker(path, split, block)
            if marker is None:
                return  # reported; what it put aside is not known
            found |= set(marker.quarantined)
            if not set(marker.quarantined) <= stated:
                where = path.relative_to(self._cache).as_posix()
                why = f"puts sequences aside that {MANIFEST} does not"
                self._faults.append(
                    Fault(kind="marker", file=where, why=why, split=split, block=block)
                )
        if stated - found and len(self._markers[split]) == self._block_count(split):
            self._add("manifest", MANIFEST, f"puts '{split}' sequences aside that no marker does")


def _read_marker(path: Path, split: str, block: int) -> tuple[Marker | None, str | None]:
    """Return a marker, or why there is none to be trusted."""
    if not path.is_file():
        return None, "is missing"
    try:
        marker = Marker.parse(path.read_bytes().decode())
    except (ValueError, OSError) as error:
        return None, _brief(error)
    said = f"{marker.block:08d}.{marker.generation}.json"
    if (marker.split, said) != (split, path.name):
        return None, f"is the marker of {marker.split} block {marker.block}, moved"
    return marker, None


def _brief(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return "is no text" if isinstance(error, UnicodeDecodeError) else str(error)
