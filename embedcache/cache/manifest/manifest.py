"""The manifest: published last, it says that a cache is complete and what its blocks hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.files import BlockFiles, Recorded, write_block_files
from embedcache.cache.format.layout import MANIFEST, ExtractSettings, block_shards
from embedcache.cache.manifest.digest_table import TableDigest
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.shards.errors import WAY_OUT
from embedcache.errors import CacheError
from embedcache.store.files import hash_json, publish_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitManifest:
    """One split's totals, and what vouches for the digest tables of its blocks (see `block_files`)."""

    sequences: int
    tokens: int
    targets: int
    documents: int
    blocks: int
    bytes: int
    """Of the embeddings on disk."""
    embeddings: TableDigest
    quarantined: TableDigest

    def files(self, cache: Path, split: str, settings: ExtractSettings) -> BlockFiles:
        """Return the records of the blocks, vouched for by this."""
        return BlockFiles(
            cache, split, settings, embeddings=self.embeddings, quarantined=self.quarantined
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All splits, and the hash that a trainer's state is tied to.

    It is small, whatever the cache: files that grow in number with it are told in digest tables.
    """

    splits: dict[str, SplitManifest]
    sealed: Digests
    """What pass 0 wrote."""
    base: Digests
    """What is kept of the base."""
    codec: Digests
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
                sealed=Digests.from_dict(value["sealed"]),
                base=Digests.from_dict(value["base"]),
                codec=Digests.from_dict(value["codec"]),
                extracted=dict(value["extracted"]),
            )
            stated = value["hash"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is damaged ({error})") from error
        if stated != manifest.hash:
            raise ValueError("does not match its own hash: it was edited")
        return manifest


def split_manifest(
    cache: Path,
    split: str,
    settings: ExtractSettings,
    totals: dict[str, int],
    blocks: Iterable[Recorded],
) -> SplitManifest:
    """Write the digest tables of a split's blocks, given in order; return what the manifest says.

    ``totals`` are those of its sequences, tokens, targets and documents.
    """
    embeddings, quarantined, size = write_block_files(cache, split, settings, blocks)
    return SplitManifest(
        blocks=embeddings.rows // len(block_shards(split, 0, settings)),
        bytes=size,
        embeddings=embeddings,
        quarantined=quarantined,
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
    embeddings, quarantined = (
        TableDigest(**value.pop(name)) for name in ("embeddings", "quarantined")
    )
    return SplitManifest(embeddings=embeddings, quarantined=quarantined, **value)
