"""Joining finished caches into a new one.

All is built beside ``out`` and renamed into place.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import SPLITS, CacheAttributes, corpora_of
from embedcache.editing.join import join
from embedcache.editing.merge_parts import Part, merged_names, require_alike, require_apart
from embedcache.errors import OutputError, UsageError
from embedcache.progress import SILENT, Progress
from embedcache.store.files import fsync_path, fsync_tree, translate_write_errors, writer_lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What was merged, or would be; counts are by split, ``bytes`` those of all that is copied."""

    out: str
    caches: tuple[str, ...]
    documents: dict[str, int]
    sequences: dict[str, int]
    tokens: dict[str, int]
    blocks: dict[str, int]
    bytes: int
    renamed: int
    """Documents whose name an earlier cache had taken."""
    dry_run: bool


def merge(
    caches: Sequence[Path], out: Path, *, dry_run: bool = False, progress: Progress = SILENT
) -> Merged:
    """Join finished caches, in their order, into the new cache ``out``.

    Raises:
        IdentityError: where base, codec, calibration or settings are not the same.
        UsageError: for fewer than two caches, or a document that is in two of them.
        OutputError: where ``out`` holds something, or its disk is too small.
        CacheError: for a cache that is incomplete or damaged; nothing is left of ``out`` then.
    """
    if len(caches) < 2:
        raise UsageError(
            f"expected two caches or more to merge, found {len(caches)}. Type for example: "
            "embedcache merge one two --out both"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} is there already, expected a new folder: give another --out")
    parts = [Part(path) for path in caches]
    for part in parts[1:]:
        require_alike(parts[0], part)
    require_apart(parts, progress)
    names = merged_names(parts)
    manifests = [part.cache.manifest for part in parts]

    def summed(key: str) -> dict[str, int]:
        return {name: sum(getattr(m.splits[name], key) for m in manifests) for name in SPLITS}

    told = Merged(
        out=str(out),
        caches=tuple(map(str, caches)),
        documents=summed("documents"),
        sequences=summed("sequences"),
        tokens=summed("tokens"),
        blocks=summed("blocks"),
        bytes=sum(part.bytes for part in parts) + parts[0].shared_bytes,
        renamed=sum(old != new for part in names for old, new in part.items()),
        dry_run=dry_run,
    )
    _require_room(out, told.bytes)
    if dry_run:
        return told
    staging = out.absolute().with_name(f".{out.name}.merging")
    with translate_write_errors(staging), writer_lock(staging):
        try:
            built = staging / "cache"
            shutil.rmtree(built, ignore_errors=True)
            built.mkdir()
            join(parts, names, built, _attributes(parts), progress)
            fsync_tree(built)
            built.replace(out)
            fsync_path(out.absolute().parent)
        finally:
            # Zarr may still be at work where it failed: what it leaves goes with the next merge.
            shutil.rmtree(staging, ignore_errors=True)
    return told


def _require_room(out: Path, needed: int) -> None:
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{out} would take {needed:,} bytes, and its disk has {free:,} free: make room, or "
            "give another --out"
        )


def _attributes(parts: list[Part]) -> CacheAttributes:
    """Return the first part's attributes, with the corpora of all."""
    corpora: list[dict[str, Any]] = []
    for part in parts:
        attributes = part.cache.attributes
        first, *others = corpora_of(attributes.corpus)
        if "parts" not in attributes.corpus:
            first = {key: value for key, value in first.items() if key != "appended"} | {
                "manifest": part.cache.manifest.hash,
                "settings": asdict(attributes.settings),
                "environment": attributes.environment,
            }
        corpora += [first, *others]
    return replace(parts[0].cache.attributes, corpus={"parts": corpora})
