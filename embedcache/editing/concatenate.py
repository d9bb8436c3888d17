"""Finished caches one after the other in one cache: block by block, nothing computed.

Blocks keep their bytes and get new numbers. Tables, counts and commit markers are written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from embedcache.base.identity import BaseIdentity
from embedcache.cache.format.layout import ROWS, SPLITS, block_shards
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.manifest.file_record import FileRecord, content_fault
from embedcache.cache.tokens.files import chunk_name
from embedcache.cache.tokens.tables import SplitTables
from embedcache.editing.edit import TOTALS, EditedBlock, FinishedCache, StagedCache
from embedcache.errors import CacheError, IdentityError
from embedcache.progress import Bar, Progress

Array = np.ndarray[Any, Any]

SAME_SETTINGS = ("codec", "taps", "top_ids", "context", "block_tokens")
"""The settings that all blocks of a cache share."""


def require_compatible(first: FinishedCache, other: FinishedCache) -> None:
    """Raise ``IdentityError`` unless the blocks of two caches can be blocks of one cache."""
    BaseIdentity.from_dict(first.attributes.base).require(
        BaseIdentity.from_dict(other.attributes.base),
        this=f"the cache {first.path}",
        that=f"the cache {other.path}",
    )
    for key in SAME_SETTINGS:
        one, two = getattr(first.settings, key), getattr(other.settings, key)
        if one != two:
            raise IdentityError(
                f"expected caches with the same `{key}=`, found {one!r} in {first.path} and "
                f"{two!r} in {other.path}. Extract one of the two corpora again with the other "
                f"`{key}=`."
            )
    if not _same_content(first.manifest.codec, other.manifest.codec):
        raise IdentityError(
            f"expected caches with the same calibration of the codec '{first.settings.codec}', "
            f"found different calibrations in {first.path} and {other.path}. Extract both corpora "
            "into one cache, or use the codec int8 or bf16."
        )
    if not _same_content(first.manifest.base, other.manifest.base):
        raise IdentityError(
            f"expected caches that store the same head of the base, found different heads in "
            f"{first.path} and {other.path}: they were extracted with another `dtype=` or another "
            "version of embedcache. Extract one of the two corpora again."
        )


def _same_content(one: Digests, two: Digests) -> bool:
    """Return whether two digests are of the same files; JSON metadata may be spelt differently."""
    files = [{(record.path, record.sha256) for record in digests.files} for digests in (one, two)]
    metadata = [{k: json.loads(v) for k, v in digests.metadata.items()} for digests in (one, two)]
    return files[0] == files[1] and metadata[0] == metadata[1]


def concatenate(caches: Sequence[FinishedCache], staged: StagedCache, progress: Progress) -> None:
    """Stage the cache that holds the blocks of all caches, in their order.

    Blocks of the cache that is edited (``staged.onto``) are in place. Files of the others are
    linked then; they are copied if the staging folder is to be a whole cache.

    Args:
        caches: compatible caches, see `require_compatible`.
        staged: the staging folder.
        progress: receives a bar over the blocks.

    Raises:
        CacheError: if a file is damaged.
    """
    new = [cache for cache in caches if cache is not staged.onto]
    total = sum(tokens.blocks for cache in new for tokens in cache.tokens.values())
    with progress.bar("taking blocks over", total, "blocks") as bar:
        for split in SPLITS:
            totals = [cache.totals(split) for cache in caches]
            staged.write_split(
                split,
                _concatenated_tables(caches, split),
                {key: sum(each[key] for each in totals) for key in TOTALS},
                _concatenated_blocks(caches, split, staged, bar),
            )


def copy_digested(cache: FinishedCache, digests: Digests, staged: StagedCache) -> None:
    """Copy all files that ``digests`` lists into the staging folder.

    Raises:
        CacheError: if one is damaged.
    """
    for record in digests.files:
        _take(cache, record, record.path, staged)
    for name, text in digests.metadata.items():
        path = staged.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def concatenated_measurements(caches: Sequence[FinishedCache]) -> dict[str, Any]:
    """Return what the manifest records of the extractions: sums over all caches.

    The base and the codec are counted once, and the error of the self-check is the largest one.
    """
    runs = [cache.manifest.extracted for cache in caches]
    tokens, seconds = (sum(run[key] for run in runs) for key in ("tokens", "seconds"))
    shared = sum(shared_bytes(cache) for cache in caches[1:])
    return {
        "tokens": tokens,
        "seconds": seconds,
        "self_check": max(run["self_check"] for run in runs),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "estimated_bytes": sum(run["estimated_bytes"] for run in runs) - shared,
        "estimated_seconds": sum(run["estimated_seconds"] for run in runs),
    }


def shared_bytes(cache: FinishedCache) -> int:
    """Return the bytes of the base and the codec, which compatible caches have in common."""
    manifest = cache.manifest
    return sum(r.bytes for digests in (manifest.base, manifest.codec) for r in digests.files)


def block_bytes(cache: FinishedCache) -> int:
    """Return the bytes of a cache's blocks, tokens and tables."""
    splits = cache.manifest.splits.values()
    return sum(s.bytes for s in splits) + sum(f.bytes for f in cache.token_files.values())


def _concatenated_blocks(
    caches: Sequence[FinishedCache], split: str, staged: StagedCache, bar: Bar
) -> Iterator[EditedBlock]:
    """Take each block over under its new number; yield the blocks in order."""
    number = first_sequence = 0
    for cache in caches:
        for block, (records, own) in enumerate(cache.blocks(split)):
            quarantined = tuple(sequence + first_sequence for sequence in own)
            if cache is staged.onto:
                yield EditedBlock(records, quarantined, generation=None)
            else:
                for array in ROWS:
                    record = cache.token_files[split].record(array, block)
                    _take(cache, record, chunk_name(split, array, number), staged)
                paths = block_shards(split, number, cache.settings)
                for record, path in zip(records, paths, strict=True):
                    _take(cache, record, path, staged)
                renamed = tuple(
                    replace(record, path=path) for record, path in zip(records, paths, strict=True)
                )
                yield EditedBlock(renamed, quarantined, generation=0)
                bar.advance(1)
            number += 1
        first_sequence += cache.manifest.splits[split].sequences


def _take(cache: FinishedCache, record: FileRecord, path: str, staged: StagedCache) -> None:
    """Link or copy a file of a cache to ``path`` in the staging folder, after a check of it."""
    source, target = cache.path / record.path, staged.folder / path
    if (fault := content_fault(cache.path, record)) is not None:
        raise CacheError(
            f"{source} is damaged ({fault}). "
            + (
                f"Nothing was merged. Repair {cache.path}: `embedcache.verify()` with `deep=True` "
                "lists the damage, `embedcache.extract()` with `repair=True` repairs it."
                if staged.onto is None
                else f"Nothing was added. Remove the folder {cache.path} and run the same call "
                "again."
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if staged.onto is None:
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def _concatenated_tables(caches: Sequence[FinishedCache], split: str) -> SplitTables:
    """Return the tables of a split of all caches, one after the other."""
    tables = [cache.tables[split] for cache in caches]
    rows = [cache.tokens[split].blocks * cache.settings.block_tokens for cache in caches]
    sequences = [len(table.rows_S2) for table in tables]
    documents = [len(table.names) for table in tables]
    indices = [
        1 + max(int(table.index_D.max(initial=-1)) for table in cache.tables.values())
        for cache in caches
    ]

    def shifted(values: list[Array], sizes: list[int]) -> Array:
        """Concatenate arrays of numbers; each is raised by the sizes of the caches before it."""
        starts = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([v + start for v, start in zip(values, starts, strict=True)])

    return SplitTables(
        rows_S2=shifted([table.rows_S2 for table in tables], rows),
        document_S=shifted([table.document_S for table in tables], documents),
        block_starts=np.append(
            shifted([table.block_starts[:-1] for table in tables], sequences), sum(sequences)
        ),
        index_D=shifted([table.index_D for table in tables], indices),
        fingerprints=np.concatenate([table.fingerprints for table in tables]),
        names=tuple(name for table in tables for name in table.names),
    )
