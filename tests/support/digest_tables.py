"""Reading and replacing the digest tables of a finished cache's blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from embedcache.cache.blocks.files import BlockRecord
from embedcache.cache.cache import read_attributes
from embedcache.cache.manifest.file_record import FileRecord
from embedcache.cache.manifest.manifest import publish_manifest, read_manifest, split_manifest
from embedcache.cache.tokens.reader import SplitTokens

TOTALS = ("sequences", "tokens", "targets", "documents")


def blocks_of(cache: Path, split: str) -> list[BlockRecord]:
    """Return the shards and the quarantined sequences of each block."""
    settings = read_attributes(cache).settings
    files = read_manifest(cache).splits[split].files(cache, split, settings)
    tokens = SplitTokens(cache, split, settings.block_tokens)
    return [
        (records, tuple(files.quarantined_in(*tokens.bounds(block)).tolist()))
        for block, records in enumerate(files)
    ]


def files_of(cache: Path, split: str) -> list[tuple[FileRecord, ...]]:
    return [files for files, _ in blocks_of(cache, split)]


def quarantined(cache: Path, split: str) -> tuple[int, ...]:
    return tuple(sequence for _, sequences in blocks_of(cache, split) for sequence in sequences)


def publish_blocks(cache: Path, split: str, blocks: list[BlockRecord]) -> None:
    """Publish digest tables of these blocks, and a manifest with their digests."""
    manifest = read_manifest(cache)
    totals = {name: getattr(manifest.splits[split], name) for name in TOTALS}
    changed = split_manifest(cache, split, read_attributes(cache).settings, totals, blocks)
    publish_manifest(cache, replace(manifest, splits=manifest.splits | {split: changed}))


def put_aside(cache: Path, split: str, block: int, sequences: tuple[int, ...]) -> None:
    """Quarantine sequences of a block in the manifest, but not in its marker."""
    blocks = blocks_of(cache, split)
    blocks[block] = (blocks[block][0], sequences)
    publish_blocks(cache, split, blocks)
