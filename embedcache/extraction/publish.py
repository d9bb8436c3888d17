"""Publishing a cache: the digest tables of its blocks and the manifest that vouches for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.commit import Marker, newest_generations
from embedcache.cache.blocks.files import BlockRecord, block_digest_tables
from embedcache.cache.format.layout import CODEC, MANIFEST, ExtractSettings, marker_path
from embedcache.cache.manifest.digests import Digests, read_digests
from embedcache.cache.manifest.manifest import (
    Manifest,
    publish_manifest,
    read_manifest,
    split_manifest,
)
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.store.files import STAGING, fsync_path, make_folder
from embedcache.store.lease import COORDINATOR, Leases


def publish(
    out: Path,
    splits: dict[str, SplitTokens],
    settings: ExtractSettings,
    extracted: dict[str, Any],
    leases: Leases,
) -> None:
    """Publish the digest tables and the manifest of a cache whose blocks are all committed.

    They are made in this attempt's staging folder. If other processes took this one for dead, the
    folder is gone and nothing is published.

    Args:
        out: the cache.
        splits: the tokens of each split.
        settings: the settings of the extraction.
        extracted: what the manifest says of the run.
        leases: the leases of this process, which coordinates.
    """
    made = leases.staging / "manifest"
    try:
        manifest = Manifest(
            splits={
                name: split_manifest(
                    made, name, settings, split.totals, _records(out, name, split.blocks)
                )
                for name, split in splits.items()
            },
            tokens=read_digests(out),
            base=Digests.of(out, out / "base"),
            codec=Digests.of(out, out / CODEC),
            extracted=extracted,
        )
        publish_manifest(made, manifest)
        for split, counts in manifest.splits.items():
            digests = (counts.embeddings, counts.quarantined)
            for name, digest in zip(block_digest_tables(split), digests, strict=True):
                leases.require(COORDINATOR)
                make_folder((out / name).parent)
                if digest.rows:
                    (made / name).replace(out / name)
                else:
                    (out / name).unlink(missing_ok=True)
                fsync_path((out / name).parent)
        leases.require(COORDINATOR)
        (made / MANIFEST).replace(out / MANIFEST)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(out)


def amend_manifest(out: Path, extracted: dict[str, Any], leases: Leases) -> None:
    """Replace entries of what the manifest says of the run.

    Like `publish`, it is made in this attempt's staging folder, so that a process that was taken
    for dead replaces nothing.
    """
    made = leases.staging / "manifest"
    make_folder(made)
    try:
        manifest = read_manifest(out)
        publish_manifest(made, replace(manifest, extracted=manifest.extracted | extracted))
        leases.require(COORDINATOR)
        (made / MANIFEST).replace(out / MANIFEST)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(out)


def _records(cache: Path, split: str, blocks: int) -> Iterator[BlockRecord]:
    """Yield the files and the quarantined sequences of each block, from its newest marker."""
    newest = newest_generations(cache, split)
    for block in range(blocks):
        marker = Marker.read(marker_path(cache, split, block, newest[block]))
        yield marker.files, marker.quarantined


def clear_unpublished(out: Path, leases: Leases) -> None:
    """Remove manifests staged by processes that died after another had published theirs.

    Other staged files beside a finished cache belong to an append or a repair that may go on.
    """
    live, staging = {writer.attempt for writer in leases.others()}, out / STAGING
    for folder in [folder for folder in staging.glob("*") if folder.name not in live]:
        shutil.rmtree(folder / "manifest", ignore_errors=True)
        with suppress(OSError):  # not empty
            folder.rmdir()
    with suppress(OSError):
        staging.rmdir()
