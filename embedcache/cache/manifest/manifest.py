"""The manifest: published last, it says that a cache is complete and what its blocks hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.files import BlockFiles, BlockRecord, write_block_files
from embedcache.cache.format.layout import MANIFEST, ExtractSettings, block_shards
from embedcache.cache.manifest.digest_table import TableDigest
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.shards.errors import REPAIR_HINT
from embedcache.errors import CacheError
from embedcache.store.files import hash_json, publish_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitManifest:
    """The counts of a split, and the digests of its blocks' digest tables (see `BlockFiles`).

    ``targets`` are tokens with a loss; ``bytes`` are those of the embeddings on disk.
    """

    sequences: int
    tokens: int
    targets: int
    documents: int
    blocks: int
    bytes: int
    embeddings: TableDigest
    quarantined: TableDigest

    def files(self, cache: Path, split: str, settings: ExtractSettings) -> BlockFiles:
        """Return the records of the blocks' files."""
        return BlockFiles(
            cache, split, settings, embeddings=self.embeddings, quarantined=self.quarantined
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The counts and digests of a finished cache.

    It is small, whatever the size of the cache: the many files are listed in digest tables.

    Attributes:
        splits: counts and digests of the blocks, by split.
        tokens: digests of all that pass 0 wrote: tokens, documents, metadata.
        base: digests of the base's head and token embedding.
        codec: digests of the codec's calibrations; empty if it needs none.
        extracted: what the run measured: tokens per second, the self-check's largest error.
    """

    splits: dict[str, SplitManifest]
    tokens: Digests
    base: Digests
    codec: Digests
    extracted: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 of the content: all but ``extracted``. Checkpoints refer to a cache by it."""
        return hash_json(self._content())

    def _content(self) -> dict[str, Any]:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        digests = {name: getattr(self, name).to_dict() for name in ("tokens", "base", "codec")}
        return {"splits": splits} | digests

    def to_text(self) -> str:
        """Return the text of the manifest's file: the manifest, its hash, the SHA-256 of both."""
        content = self._content()
        value = {"hash": hash_json(content), "extracted": self.extracted} | content
        value = {"sha256": hash_json(value)} | value
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Parse the text of `to_text`; raises ``ValueError``, saying why, for another text.

        The file's SHA-256 is not compared, only the hash: no reader depends on ``extracted``.
        """
        try:
            value = json.loads(text)
            manifest = cls(
                splits={name: _parse_split(split) for name, split in value["splits"].items()},
                tokens=Digests.from_dict(value["tokens"]),
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
    blocks: Iterable[BlockRecord],
) -> SplitManifest:
    """Write the digest tables of a split's blocks; return the split's part of the manifest.

    Args:
        cache: where the digest tables are written.
        split: the split's name.
        settings: the cache's settings.
        totals: the split's sequences, tokens, targets and documents.
        blocks: the blocks' records, in order.
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
            "extraction was stopped. Run the same `embedcache.extract()` again: it resumes."
        )
    try:
        return Manifest.parse(path.read_bytes().decode())
    except ValueError as error:
        raise CacheError(f"{path} {error}. {REPAIR_HINT}") from error


def _parse_split(value: dict[str, Any]) -> SplitManifest:
    embeddings, quarantined = (
        TableDigest(**value.pop(name)) for name in ("embeddings", "quarantined")
    )
    return SplitManifest(embeddings=embeddings, quarantined=quarantined, **value)
