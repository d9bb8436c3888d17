"""Verifying a cache: every file is compared with the digests that were taken when it was written.

Digests are themselves checked first: the manifest, ``tokens.json`` and every marker hold their own
SHA-256. Nothing is written or locked, so that a cache on a read-only disk can be verified.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from embedcache.cache.blocks.files import BlockFiles, block_digest_tables
from embedcache.cache.cache import read_attributes
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    MANIFEST,
    SPLITS,
    TOKENS_DIGESTS,
    CacheAttributes,
    parts_of,
)
from embedcache.cache.manifest.digest_table import DigestTable
from embedcache.cache.manifest.digests import METADATA, Digests, metadata_fault
from embedcache.cache.manifest.file_record import FileRecord, content_fault, fault_in
from embedcache.cache.manifest.manifest import Manifest
from embedcache.cache.tokens.files import TokenFiles
from embedcache.cache.verify_blocks import BlockVerifier, Fault, Kind, brief, markers_of
from embedcache.errors import CacheError
from embedcache.progress import SILENT, Progress
from embedcache.store.lease import writers_of
from embedcache.store.transaction import transaction_pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of `verify`.

    Attributes:
        cache: the cache's folder.
        complete: whether it has a manifest; without one, only committed blocks are verified.
        deep: whether every byte was read.
        blocks: the number of blocks.
        committed: how many of them have a commit marker.
        files: how many files were verified.
        bytes: their size.
        faults: the damaged files.
        writers: the processes that write the cache.
        parts: for a merged cache, the sources of each cache that it was made from.
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


def verify(cache: str | Path, *, deep: bool = False, progress: Progress = SILENT) -> Verification:
    """Find every damaged file of a cache, which other processes may be writing.

    Args:
        cache: the cache's folder.
        deep: read every byte: compare the SHA-256 of each shard and decode each chunk. Otherwise
            metadata, tokens, documents and tensors of the base are read, and of the shards only
            sizes and the checksums at the ends of their chunks.
        progress: shows how far it is.

    Returns:
        The damaged files, and counts.

    Raises:
        CacheError: there is no cache, its schema is newer, documents are being deleted or added, or
            files do not match while another process writes the cache (which is no damage yet).
    """
    cache = Path(cache)
    while True:
        before = _state(cache)
        try:
            found = verify_idle(cache, deep=deep, progress=progress)
        except CacheError as error:
            _require_idle(cache, error)
            raise
        if not found.faults:
            return replace(found, writers=tuple(map(str, writers_of(cache))))
        _require_idle(cache, found.faults[0])
        if before == _state(cache):
            return found


def verify_idle(cache: Path, *, deep: bool = False, progress: Progress = SILENT) -> Verification:
    """Find every damaged file of a cache that no other process writes; see `verify`.

    Raises ``CacheError`` if there is no cache, or its schema is newer.
    """
    if not any((cache / name).is_file() for name in (METADATA, MANIFEST, TOKENS_DIGESTS)):
        read_attributes(cache)  # raises, saying what is missing
    return _Verifier(cache, deep).run(progress)


class _Verifier:
    """Verifies one cache; ``_faults`` fills meanwhile."""

    def __init__(self, cache: Path, deep: bool):
        self._cache = cache
        self._deep = deep
        self._faults: list[Fault] = []
        self._markers = markers_of(cache)
        self._manifest = self._read_manifest()
        self._digests = self._read_digests()
        self._files = 0
        self._bytes = 0

    def run(self, progress: Progress) -> Verification:
        blocks = 0
        if self._digests is None:
            read_attributes(self._cache)  # raises for a cache of a newer schema
        else:
            self._check_digests(self._digests, "tokens")
            self._check_tokens(self._digests)
            records: dict[str, BlockFiles] = {}
            if self._manifest is not None:
                records = self._check_digest_tables(self._manifest)
                self._check_digests(self._manifest.base, "base")
                self._check_digests(self._manifest.codec, "codec")
            counts = {name: self._block_count(self._digests, name) for name in SPLITS}
            blocks = sum(counts.values())
            verifier = BlockVerifier(
                self._cache, self._deep, self._attributes, counts, records, self._markers
            )
            self._faults += verifier.run(progress)
            self._files += verifier.files
            self._bytes += verifier.bytes
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
            parts=() if self._digests is None else parts_of(self._attributes.corpus),
        )

    def _add(self, kind: Kind, file: str, why: str) -> None:
        self._faults.append(Fault(kind=kind, file=file, why=why))

    def _read_manifest(self) -> Manifest | None:
        """Return the manifest if its content matches its hash."""
        path = self._cache / MANIFEST
        if not path.is_file():
            return None
        try:
            text = path.read_bytes().decode()
            manifest = Manifest.parse(text)
        except (ValueError, OSError) as error:
            self._add("manifest", MANIFEST, brief(error))
            return None
        if manifest.to_text() != text:
            self._add("manifest", MANIFEST, "does not match its own SHA-256: it was edited")
        return manifest

    def _read_digests(self) -> Digests | None:
        """Return the digests of the tokens: the manifest's, or else those of ``tokens.json``."""
        expected = None if self._manifest is None else self._manifest.tokens
        path = self._cache / TOKENS_DIGESTS
        if not path.is_file():
            self._add("digests", TOKENS_DIGESTS, "is missing")
            return expected
        try:
            found = Digests.parse(path.read_bytes().decode())
        except (ValueError, OSError) as error:
            self._add("digests", TOKENS_DIGESTS, brief(error))
            return expected
        if expected is not None and found != expected:
            self._add("digests", TOKENS_DIGESTS, f"does not name the files that {MANIFEST} names")
        return expected or found

    def _check_digests(self, digests: Digests, kind: Literal["tokens", "base", "codec"]) -> None:
        for name, text in digests.metadata.items():
            self._files += 1
            self._bytes += len(text)
            if (why := metadata_fault(self._cache / name, text)) is not None:
                self._add("metadata" if kind == "tokens" else kind, name, why)
        for record in digests.files:
            self._check_file(record, kind)

    def _check_tokens(self, digests: Digests) -> None:
        """Check the digest tables of pass 0 and each file that they list."""
        for split in SPLITS:
            tokens = TokenFiles(self._cache, split, digests)
            self._check_digest_table(tokens.digest_table, tokens.name)
            for record in filter(None, (record for _, record in tokens.records())):
                self._check_file(record, "tokens")

    def _check_digest_tables(self, manifest: Manifest) -> dict[str, BlockFiles]:
        """Check the digest tables of the blocks; return the records, by split."""
        records = {}
        for name, split in manifest.splits.items():
            records[name] = found = split.files(self._cache, name, self._attributes.settings)
            tables = (found.embeddings, found.quarantined)
            for table, path in zip(tables, block_digest_tables(name), strict=True):
                self._check_digest_table(table, path)
        return records

    def _check_digest_table(self, table: DigestTable, name: str) -> None:
        self._files += bool(len(table))
        self._bytes += table.size
        if (why := table.fault()) is not None:
            self._add("digest_table", name, why)

    def _check_file(self, record: FileRecord, kind: Kind) -> None:
        self._files += 1
        self._bytes += record.bytes
        why = fault_in(self._cache, record) or content_fault(self._cache, record)
        if why is not None:
            self._add(kind, record.path, why)

    @cached_property
    def _attributes(self) -> CacheAttributes:
        """The root attributes as they were written."""
        assert self._digests is not None
        value = json.loads(self._digests.metadata[METADATA])["attributes"][ATTRIBUTE]
        return CacheAttributes.from_dict(value, path=self._cache)

    def _block_count(self, digests: Digests, split: str) -> int:
        ids = json.loads(digests.metadata[f"{split}/tokens/ids/{METADATA}"])
        return int(ids["shape"][0]) // self._attributes.settings.block_tokens


def _state(cache: Path) -> tuple[object, ...]:
    """Return a value that changes when a writer changes what the cache should hold."""
    markers = [path for found in markers_of(cache).values() for path in found.values()]
    return (*markers, *(_identity(cache / n) for n in (MANIFEST, TOKENS_DIGESTS, METADATA)))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _require_idle(cache: Path, found: object) -> None:
    """Raise ``CacheError`` if a cache is being written, so that ``found`` is no damage yet."""
    if transaction_pending(cache):
        raise CacheError(
            f"documents are being deleted from {cache} or added to it, or that was interrupted, "
            f"and not all files match yet ({found}): wait for it, or run the same "
            "`embedcache.delete()` or `embedcache.append()` again to finish it, then verify again"
        )
    if writers := writers_of(cache):
        raise CacheError(
            f"{cache} is being written by {', '.join(map(str, writers))}, and not all files match "
            f"yet ({found}): wait for that, then verify again"
        )
