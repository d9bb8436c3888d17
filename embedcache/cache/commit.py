"""Blocks and their commit markers.

A writer stages a block's shards under its attempt's id, flushes them, then creates the block's
marker exclusively and whole (a hard link of a finished file). The marker names the attempt and each
file's size and hash; only then are the files moved into place, idempotently, by whoever comes
first. A writer that lost the race, or died, can harm nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.arrays import chunk_rows
from embedcache.cache.codecs import ArraySpec
from embedcache.cache.coders import CODERS
from embedcache.cache.layout import COMMITS, STAGING, marker_path, shard_name
from embedcache.cache.shard import write_shard
from embedcache.errors import CacheError
from embedcache.files import fsync_path, make_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A committed file: path inside the cache, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What a commit marker says. ``quarantined`` are sequences (of the split) never to be read."""

    split: str
    block: int
    generation: int
    attempt: str
    files: tuple[FileRecord, ...]
    quarantined: tuple[int, ...]

    def to_json(self) -> str:
        """Return the marker as one JSON line."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Marker:
        """Read a marker; raises ``CacheError`` where the file is not one."""
        try:
            value = json.loads(path.read_text())
            value["files"] = tuple(FileRecord(**record) for record in value["files"])
            value["quarantined"] = tuple(value["quarantined"])
            return cls(**value)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{path} is not a whole commit marker ({error}). Delete that file and run the "
                "same 'embedcache extract' again: it recomputes the block."
            ) from error


def committed_blocks(cache: Path, split: str) -> dict[int, Path]:
    """Return the newest marker of every committed block of a split."""
    newest: dict[int, tuple[int, Path]] = {}
    folder = cache / COMMITS / split
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := re.fullmatch(r"(\d+)\.(\d+)\.json", path.name)) is None:
            continue
        block, generation = int(match[1]), int(match[2])
        if block not in newest or generation > newest[block][0]:
            newest[block] = (generation, path)
    return {block: path for block, (_, path) in sorted(newest.items())}


class BlockWriter:
    """Stages and commits blocks for one attempt (one run of one process)."""

    def __init__(self, cache: Path):
        self._cache = cache
        self.attempt = uuid.uuid4().hex
        self._folder = cache / STAGING / self.attempt
        self._folder.mkdir(parents=True)

    def commit(
        self,
        split: str,
        block: int,
        arrays: dict[str, tuple[ArraySpec, np.ndarray[Any, Any]]],
        *,
        quarantined: tuple[int, ...] = (),
        generation: int = 0,
    ) -> Marker:
        """Stage ``arrays`` (path under the split → its kind and R rows); commit them as one block.

        Returns the marker that stands: another writer's, where it was first. Safe to call from
        several threads for different blocks.
        """
        records = tuple(
            self._stage(f"{split}/{name}", block, spec, values)
            for name, (spec, values) in arrays.items()
        )
        marker = Marker(
            split=split,
            block=block,
            generation=generation,
            attempt=self.attempt,
            files=records,
            quarantined=quarantined,
        )
        finished = self._folder / f"{split}.{block}.{generation}.marker"
        finished.write_text(marker.to_json())
        fsync_path(finished)
        target = marker_path(self._cache, split, block, generation)
        make_folder(target.parent)
        try:
            os.link(finished, target)
        except FileExistsError:
            marker = Marker.read(target)
        fsync_path(target.parent)
        finished.unlink()
        promote(self._cache, marker)
        return marker

    def _stage(
        self, array: str, block: int, spec: ArraySpec, values: np.ndarray[Any, Any]
    ) -> FileRecord:
        """Write one shard of the array under the attempt's folder."""
        name = shard_name(array, block, values.ndim)
        size, digest = write_shard(
            self._folder / name, values, chunk_rows(spec, len(values)), CODERS[spec.coder]
        )
        return FileRecord(path=name, bytes=size, sha256=digest)

    def close(self) -> None:
        """Remove the attempt's staging folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def promote(cache: Path, marker: Marker) -> None:
    """Move a marker's files into place where they still lie in staging; safe to repeat."""
    for record in marker.files:
        target = cache / record.path
        make_folder(target.parent)
        with suppress(FileNotFoundError):  # promoted before
            (cache / STAGING / marker.attempt / record.path).replace(target)
        fsync_path(target.parent)


def recover(cache: Path, split: str, block_count: int) -> dict[int, Marker]:
    """Finish what dead attempts committed; return the markers whose files are all in place.

    A marker whose files are gone (deleted by hand, or a disk that lied) is withdrawn, so that the
    block is computed again.
    """
    done: dict[int, Marker] = {}
    for block, path in committed_blocks(cache, split).items():
        marker = Marker.read(path)
        if block >= block_count or (marker.split, marker.block) != (split, block):
            raise CacheError(
                f"{path} marks block {marker.block} of split '{marker.split}', expected its name's "
                f"and one of the {block_count} blocks of '{split}': the folder mixes two caches. "
                "Extract into an empty folder."
            )
        promote(cache, marker)
        whole = all(
            (cache / record.path).is_file() and (cache / record.path).stat().st_size == record.bytes
            for record in marker.files
        )
        if whole:
            done[block] = marker
        else:
            path.unlink()
    return done


def clear_staging(cache: Path) -> None:
    """Remove what dead attempts staged and never committed; under the lock, after `recover`."""
    shutil.rmtree(cache / STAGING, ignore_errors=True)
