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
from collections.abc import Collection, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.arrays import chunk_rows
from embedcache.cache.codecs import ArraySpec
from embedcache.cache.coders import CODERS
from embedcache.cache.damaged import WAY_OUT
from embedcache.cache.layout import COMMITS, STAGING, marker_path, shard_name
from embedcache.cache.records import FileRecord, chunks_crc32c
from embedcache.cache.shard import write_shard
from embedcache.errors import CacheError
from embedcache.files import fsync_path, hash_json, make_folder


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
        """Return the marker and its own SHA-256 as one JSON line."""
        content = asdict(self)
        return json.dumps(content | {"sha256": hash_json(content)}, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str) -> Marker:
        """Return the marker that `to_json` told; ``ValueError`` saying why for another text."""
        try:
            value = json.loads(text)
            value.pop("sha256")
            value["files"] = tuple(FileRecord(**record) for record in value["files"])
            value["quarantined"] = tuple(value["quarantined"])
            marker = cls(**value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is not a whole commit marker ({error})") from error
        if marker.to_json() != text:
            raise ValueError("does not match its own SHA-256: it was edited")
        return marker

    @classmethod
    def read(cls, path: Path) -> Marker:
        """Read a marker; raises ``CacheError`` where the file is not one, or was edited."""
        try:
            return cls.parse(path.read_bytes().decode())
        except ValueError as error:
            raise CacheError(f"{path} {error}. {WAY_OUT}") from error


def committed_blocks(cache: Path, split: str) -> dict[int, Path]:
    """Return the newest marker of every committed block of a split."""
    found = newest_generations(cache, split)
    return {block: marker_path(cache, split, block, found[block]) for block in sorted(found)}


def newest_generations(cache: Path, split: str) -> dict[int, int]:
    """Return the newest generation of each block's markers, sound or not."""
    newest: dict[int, int] = {}
    for block, generation, _ in _markers(cache, split):
        newest[block] = max(newest.get(block, 0), generation)
    return newest


def drop_superseded(cache: Path, split: str) -> None:
    """Remove every marker of which there is a newer generation."""
    newest = newest_generations(cache, split)
    markers = _markers(cache, split)
    for path in [path for block, generation, path in markers if generation < newest[block]]:
        path.unlink()


def _markers(cache: Path, split: str) -> Iterator[tuple[int, int, Path]]:
    """Yield (block, generation, path) of a split's markers, as the folder lists them."""
    folder = cache / COMMITS / split
    with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
        for entry in entries:
            if match := re.fullmatch(r"(\d+)\.(\d+)\.json", entry.name):
                yield int(match[1]), int(match[2]), Path(entry)


class BlockWriter:
    """Stages and commits blocks for one attempt (one run of one process), by its id."""

    def __init__(self, cache: Path, attempt: str | None = None):
        self._cache = cache
        self.attempt = attempt or uuid.uuid4().hex
        self._folder = cache / STAGING / self.attempt
        self._folder.mkdir(parents=True, exist_ok=True)

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
        marker = self._link(marker)
        promote(self._cache, marker)
        return marker

    def renew(
        self,
        split: str,
        block: int,
        files: tuple[FileRecord, ...],
        *,
        quarantined: tuple[int, ...],
        generation: int,
    ) -> Marker:
        """Commit a block whose files are in place and sound, but whose marker was lost."""
        return self._link(
            Marker(
                split=split,
                block=block,
                generation=generation,
                attempt=self.attempt,
                files=files,
                quarantined=quarantined,
            )
        )

    def _link(self, marker: Marker) -> Marker:
        """Create a marker, exclusively and whole; return the one that stands."""
        finished = self._folder / f"{marker.split}.{marker.block}.{marker.generation}.marker"
        finished.write_text(marker.to_json())
        fsync_path(finished)
        target = marker_path(self._cache, marker.split, marker.block, marker.generation)
        make_folder(target.parent)
        try:
            os.link(finished, target)
        except FileExistsError:
            marker = Marker.read(target)
        fsync_path(target.parent)
        finished.unlink()
        return marker

    def _stage(
        self, array: str, block: int, spec: ArraySpec, values: np.ndarray[Any, Any]
    ) -> FileRecord:
        """Write one shard of the array under the attempt's folder."""
        name = shard_name(array, block, values.ndim)
        rows = chunk_rows(spec, len(values))
        size, digest = write_shard(self._folder / name, values, rows, CODERS[spec.coder])
        crc32c = chunks_crc32c(self._folder / name, len(values) // rows)
        return FileRecord(path=name, bytes=size, sha256=digest, crc32c=crc32c)

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


def recover(
    cache: Path, split: str, block_count: int, live: Collection[str] = ()
) -> Iterator[Marker]:
    """Finish what attempts committed; yield the markers whose files are all in place, by block.

    A marker whose files are gone (deleted by hand, or a disk that lied) is withdrawn, so that the
    block is computed again; but not one of a ``live`` attempt, which may be at it just now.
    """
    newest = newest_generations(cache, split)
    for block in sorted(newest):
        path = marker_path(cache, split, block, newest[block])
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
            yield marker
        elif marker.attempt not in live:
            path.unlink()


def clear_staging(cache: Path, live: Collection[str] = ()) -> None:
    """Remove what all but the ``live`` attempts staged and never committed.

    Call after `recover`, with attempts that were found live before it: what one committed last,
    and died, is not in place yet.
    """
    if not live:
        shutil.rmtree(cache / STAGING, ignore_errors=True)
        return
    for folder in (cache / STAGING).glob("*"):
        if folder.name not in live:
            shutil.rmtree(folder, ignore_errors=True)
