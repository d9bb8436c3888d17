"""The manifest: published last, it says that a cache is complete and what its blocks hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.commit import FileRecord, Marker
from embedcache.cache.layout import MANIFEST, SPLITS
from embedcache.errors import CacheError
from embedcache.files import hash_file, hash_json, publish_json


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitManifest:
    """One split's totals and, for each block, its files and quarantined sequences."""

    sequences: int
    tokens: int
    targets: int
    documents: int
    files: tuple[tuple[FileRecord, ...], ...]
    quarantined: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.files)

    @property
    def bytes(self) -> int:
        """Bytes of the embeddings on disk."""
        return sum(record.bytes for block in self.files for record in block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All splits, and the hash that a trainer's state is tied to."""

    splits: dict[str, SplitManifest]
    files: tuple[FileRecord, ...]
    """What is no block's: sealed tokens, documents, and what is kept of the base."""
    extracted: dict[str, Any]
    """What the run saw: tokens per second, the self-check's largest error."""

    @property
    def hash(self) -> str:
        """SHA-256 over all files: equal for equal content, whatever the speed it was made at."""
        return hash_json(self._content())

    def _content(self) -> dict[str, Any]:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return {"splits": splits, "files": [asdict(record) for record in self.files]}

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values, with its hash."""
        return {"hash": self.hash, "extracted": self.extracted} | self._content()


def split_manifest(
    totals: dict[str, int], markers: dict[int, Marker], block_count: int
) -> SplitManifest:
    """Join a split's markers; raises ``CacheError`` naming the blocks that have none."""
    missing = [block for block in range(block_count) if block not in markers]
    if missing:
        raise CacheError(
            f"{len(missing)} of {block_count} blocks are not committed (first: {missing[0]}): run "
            "the same 'embedcache extract' again"
        )
    return SplitManifest(
        files=tuple(markers[block].files for block in range(block_count)),
        quarantined=tuple(
            sequence for block in range(block_count) for sequence in markers[block].quarantined
        ),
        **totals,
    )


def publish_manifest(cache: Path, manifest: Manifest) -> None:
    """Publish the manifest: from here on readers may open the cache."""
    publish_json(cache / MANIFEST, manifest.to_dict())


def sealed_files(cache: Path) -> tuple[FileRecord, ...]:
    """Return the records of every file that was written before the first block.

    Zarr takes a chunk that is not there for zeros, and an empty object for a group without
    attributes; readers hold the files against these records.
    """
    folders = [cache / split / part for split in SPLITS for part in ("tokens", "documents")]
    paths = [cache / split / "zarr.json" for split in SPLITS]
    for folder in [*folders, cache / "base", cache / "codec"]:
        paths += sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        FileRecord(
            path=path.relative_to(cache).as_posix(),
            bytes=path.stat().st_size,
            sha256=hash_file(path),
        )
        for path in paths
    )


def check_files(cache: Path, records: Iterable[FileRecord]) -> None:
    """Raise ``CacheError`` unless every file is there in its size; checksums hold its content."""
    for record in records:
        path = cache / record.path
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CacheError(
                f"{path} {found}, expected {record.bytes} bytes: the cache is damaged. "
                "Extract into a new folder."
            )


def read_manifest(cache: Path) -> Manifest:
    """Read and check the manifest; raises ``CacheError`` if absent, damaged or edited."""
    path = cache / MANIFEST
    if not path.is_file():
        raise CacheError(
            f"{cache} is not complete (no {MANIFEST}): it is still being written, or its "
            "extraction was stopped. Run the same 'embedcache extract' again: it resumes."
        )
    try:
        value = json.loads(path.read_text())
        manifest = Manifest(
            splits={name: _parse_split(split) for name, split in value["splits"].items()},
            files=_parse_files(value["files"]),
            extracted=value["extracted"],
        )
        stated = value["hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error}): delete it and run extract again") from error
    if stated != manifest.hash:
        raise CacheError(
            f"{path} does not match its own hash (states {stated[:12]}, is {manifest.hash[:12]}): "
            "it was edited. Delete it and run the same 'embedcache extract' again."
        )
    return manifest


def _parse_split(value: dict[str, Any]) -> SplitManifest:
    files = tuple(_parse_files(block) for block in value.pop("files"))
    quarantined = tuple(value.pop("quarantined"))
    return SplitManifest(files=files, quarantined=quarantined, **value)


def _parse_files(records: list[dict[str, Any]]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(**record) for record in records)
