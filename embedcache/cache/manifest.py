"""The manifest: published last, it says that a cache is complete and what its blocks hold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.commit import Marker
from embedcache.cache.damaged import WAY_OUT
from embedcache.cache.layout import MANIFEST
from embedcache.cache.records import FileRecord
from embedcache.cache.sealed import Seal
from embedcache.errors import CacheError
from embedcache.files import hash_json, publish_bytes


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
    sealed: Seal
    """What pass 0 wrote."""
    base: Seal
    """What is kept of the base."""
    codec: Seal
    """The codec's calibration; empty where it needs none."""
    extracted: dict[str, Any]
    """What the run saw: tokens per second, the self-check's largest error."""

    @property
    def hash(self) -> str:
        """SHA-256 over all files: equal for equal content, whatever the speed it was made at."""
        return hash_json(self._content())

    def _content(self) -> dict[str, Any]:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        seals = {name: getattr(self, name).to_dict() for name in ("sealed", "base", "codec")}
        return {"splits": splits} | seals

    def to_text(self) -> str:
        """Return what the manifest's file holds: all of it, its hash, and the SHA-256 of these."""
        content = self._content()
        value = {"hash": hash_json(content), "extracted": self.extracted} | content
        value = {"sha256": hash_json(value)} | value
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Return the manifest that `to_text` told; ``ValueError`` saying why for another text.

        What the run saw is not held to the file's SHA-256: no reader depends on that.
        """
        try:
            value = json.loads(text)
            manifest = cls(
                splits={name: _parse_split(split) for name, split in value["splits"].items()},
                sealed=Seal.from_dict(value["sealed"]),
                base=Seal.from_dict(value["base"]),
                codec=Seal.from_dict(value["codec"]),
                extracted=dict(value["extracted"]),
            )
            stated = value["hash"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is damaged ({error})") from error
        if stated != manifest.hash:
            raise ValueError("does not match its own hash: it was edited")
        return manifest


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
    publish_bytes(cache / MANIFEST, manifest.to_text().encode())


def read_manifest(cache: Path) -> Manifest:
    """Read and check the manifest; raises ``CacheError`` if absent, damaged or edited."""
    path = cache / MANIFEST
    if not path.is_file():
        raise CacheError(
            f"{cache} is not complete (no {MANIFEST}): it is still being written, or its "
            "extraction was stopped. Run the same 'embedcache extract' again: it resumes."
        )
    try:
        return Manifest.parse(path.read_bytes().decode())
    except ValueError as error:
        raise CacheError(f"{path} {error}. {WAY_OUT}") from error


def _parse_split(value: dict[str, Any]) -> SplitManifest:
    files = tuple(tuple(FileRecord(**record) for record in block) for block in value.pop("files"))
    quarantined = tuple(value.pop("quarantined"))
    return SplitManifest(files=files, quarantined=quarantined, **value)
