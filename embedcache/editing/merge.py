"""Merging finished caches of one base into a new cache."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embedcache.cache.format.layout import SPLITS, CacheAttributes, corpora_of
from embedcache.editing.concatenate import (
    block_bytes,
    concatenate,
    concatenated_measurements,
    copy_digested,
    require_compatible,
    shared_bytes,
)
from embedcache.editing.edit import FinishedCache, StagedCache, file_of
from embedcache.errors import OutputError, UsageError
from embedcache.progress import SILENT, Bar, Progress
from embedcache.store.files import (
    free_disk,
    fsync_path,
    fsync_tree,
    translate_write_errors,
    writer_lock,
)
from embedcache.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """The contents of a merged cache, or of the cache that a dry run would make."""

    out: str
    caches: tuple[str, ...]
    documents: dict[str, int]
    """By split, like the three counts that follow."""
    sequences: dict[str, int]
    tokens: dict[str, int]
    blocks: dict[str, int]
    bytes: int
    renamed: int
    """Documents that got a new name, because an earlier cache has a document of the same name."""
    dry_run: bool


def merge(
    caches: Sequence[str | Path],
    out: str | Path,
    *,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> MergeSummary:
    """Merge finished caches of one base into a new cache, in their order.

    Blocks are copied, and nothing is computed. The merged cache is built beside ``out`` and renamed
    when it is whole.

    Args:
        caches: two or more caches with the same base, codec (for ``transform``: the very same
            calibration), taps, context and block size. They stay as they are.
        out: the folder of the new cache, absent or empty.
        dry_run: make every check and return the summary, but write nothing.
        progress: receives a bar for each stage.

    Returns:
        The counts of the merged cache.

    Raises:
        IdentityError: if the caches differ in base, codec, calibration or settings.
        UsageError: if there are fewer than two caches, or if a document is in two of them.
        OutputError: if ``out`` is not empty, or its disk is too small.
        CacheError: if a cache is incomplete or damaged.
    """
    out = Path(out)
    if len(caches) < 2:
        raise UsageError(f"expected two or more caches to merge, found {len(caches)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            f"expected `out=` to be a new or empty folder, found that {out} exists. Give another "
            "`out=`."
        )
    opened = [FinishedCache(Path(path)) for path in caches]
    for other in opened[1:]:
        require_compatible(opened[0], other)
    _require_disjoint(opened, progress)
    renamed = _rename_documents(opened)
    summary = MergeSummary(
        out=str(out),
        caches=tuple(map(str, caches)),
        documents=_summed(opened, "documents"),
        sequences=_summed(opened, "sequences"),
        tokens=_summed(opened, "tokens"),
        blocks=_summed(opened, "blocks"),
        bytes=sum(map(block_bytes, opened)) + shared_bytes(opened[0]),
        renamed=renamed,
        dry_run=dry_run,
    )
    _require_room(out, summary.bytes)
    if dry_run:
        return summary
    staging = out.absolute().with_name(f".{out.name}.merging")
    with translate_write_errors(staging), writer_lock(staging):
        try:
            built = staging / "cache"
            shutil.rmtree(built, ignore_errors=True)
            built.mkdir()
            _build(opened, StagedCache(built, _merged_attributes(opened), onto=None), progress)
            fsync_tree(built)
            built.replace(out)
            fsync_path(out.absolute().parent)
        finally:
            # Threads of zarr may still write after an error; the next merge removes such files.
            shutil.rmtree(staging, ignore_errors=True)
    return summary


def _build(caches: list[FinishedCache], staged: StagedCache, progress: Progress) -> None:
    manifest = caches[0].manifest
    for digests in (manifest.base, manifest.codec):
        copy_digested(caches[0], digests, staged)
    concatenate(caches, staged, progress)
    staged.publish(
        base=manifest.base, codec=manifest.codec, extracted=concatenated_measurements(caches)
    )


def _summed(caches: list[FinishedCache], key: str) -> dict[str, int]:
    """Return a count of the merged cache, by split."""
    return {
        split: sum(getattr(cache.manifest.splits[split], key) for cache in caches)
        for split in SPLITS
    }


def _require_room(out: Path, needed: int) -> None:
    """Raise ``OutputError`` if the disk of ``out`` has fewer free bytes than ``needed``."""
    free = free_disk(out)
    if free < needed:
        raise OutputError(
            f"expected {format_bytes(needed)} of free space for {out}, found "
            f"{format_bytes(free)}. Make room, or give another `out=`."
        )


def _require_disjoint(caches: list[FinishedCache], progress: Progress) -> None:
    """Raise ``UsageError`` if a document is in two caches.

    Documents with the same tokens and targets are the same if their names are, too. In different
    splits they are the same whatever their names.
    """
    seen: dict[str, list[tuple[FinishedCache, str, str]]] = {}
    total = sum(tokens.blocks for cache in caches for tokens in cache.tokens.values())
    with progress.bar("comparing documents", total, "blocks") as bar:
        for cache in caches:
            own = [
                (digest, (cache, split, name))
                for split in SPLITS
                for name, digest in zip(
                    cache.tables[split].names, _document_digests(cache, split, bar), strict=True
                )
            ]
            for digest, place in own:
                for other in seen.get(digest, ()):
                    _require_distinct(other, place)
            for digest, place in own:
                seen.setdefault(digest, []).append(place)


def _require_distinct(
    one: tuple[FinishedCache, str, str], two: tuple[FinishedCache, str, str]
) -> None:
    """Raise ``UsageError`` if two documents (cache, split, name) of equal tokens are the same."""
    (cache, split, name), (other, other_split, other_name) = one, two
    if split == other_split and name != other_name:
        return
    harm = (
        "it would be trained on twice"
        if split == other_split
        else "a carry-on would be tested on a document that it was trained on"
    )
    raise UsageError(
        f"expected each document in one cache, found '{name}' in {split} of {cache.path} and "
        f"'{other_name}' in {other_split} of {other.path} with the same tokens: {harm}. Delete the "
        "document from one of the two caches with `embedcache.delete()`."
    )


def _document_digests(cache: FinishedCache, split: str, bar: Bar) -> list[str]:
    """Return the SHA-256 of each document's tokens and targets."""
    tokens = cache.tokens[split]
    hashes = [hashlib.sha256() for _ in cache.tables[split].names]
    for block in range(tokens.blocks):
        ids_N, mask_N = tokens.used(block)
        for document, (a, b) in zip(
            tokens.documents(block).tolist(), tokens.offsets(block).tolist(), strict=True
        ):
            hashes[document].update(b"%d:" % (b - a))
            hashes[document].update(ids_N[a:b].tobytes() + mask_N[a:b].tobytes())
        bar.advance(1)
    return [found.hexdigest() for found in hashes]


def _rename_documents(caches: list[FinishedCache]) -> int:
    """Rename documents to ``a@2`` where an earlier cache has an ``a``; return how many.

    An extraction names documents of two sources by the same rule. The pieces of a file keep one
    name.
    """
    taken: set[str] = set()
    renamed = 0
    for cache in caches:
        files = {file_of(name) for table in cache.tables.values() for name in table.names}
        new: dict[str, str] = {}
        for file in files:
            numbered = (f"{file}@{count}" for count in itertools.count(2))
            free = (name for name in numbered if name not in taken and name not in files)
            new[file] = next(free) if file in taken else file
        taken |= {*new.values()}
        for split, table in cache.tables.items():
            names = tuple(new[file_of(n)] + n.removeprefix(file_of(n)) for n in table.names)
            renamed += sum(old != name for old, name in zip(table.names, names, strict=True))
            cache.tables[split] = replace(table, names=names)
    return renamed


def _merged_attributes(caches: list[FinishedCache]) -> CacheAttributes:
    """Return the first cache's attributes, with the corpora of all caches."""
    corpora: list[dict[str, Any]] = []
    for cache in caches:
        attributes = cache.attributes
        first, *others = corpora_of(attributes.corpus)
        if "parts" not in attributes.corpus:
            first = {key: value for key, value in first.items() if key != "appended"} | {
                "manifest": cache.manifest.hash,
                "settings": asdict(attributes.settings),
                "environment": attributes.environment,
            }
        corpora += [first, *others]
    return replace(caches[0].attributes, corpus={"parts": corpora})
