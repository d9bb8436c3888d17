"""Blocks and their commit markers.

A writer stages the shards of a block in the folder of its attempt, flushes them, then creates the
block's marker exclusively and whole: a hard link to a finished file. The marker names the attempt
and the size and hashes of each file. After that any process may move the files into place, and may
repeat it. A writer that lost the race, or died, can harm nothing.
"""

from __future__ import annotations

import errno
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

from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import COMMITS, marker_path, shard_name
from embedcache.cache.manifest.file_record import FileRecord, chunks_crc32c
from embedcache.cache.shards.errors import REPAIR_HINT
from embedcache.cache.shards.shard import write_shard
from embedcache.errors import CacheError
from embedcache.store.files import STAGING, fsync_path, hash_json, make_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A commit marker: it commits the ``files`` of a block.

    ``quarantined`` are the numbers (in the split) of sequences that are never read. A repaired
    block has a marker of a higher ``generation``; the highest counts.
    """

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
        """Parse the text of `to_json`; raises ``ValueError``, saying why, for another text."""
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
        """Read a marker; raises ``CacheError`` if the file is none, or was edited."""
        try:
            return cls.parse(path.read_bytes().decode())
        except ValueError as error:
            raise CacheError(f"{path} {error}. {REPAIR_HINT}") from error


def committed_blocks(cache: Path, split: str) -> dict[int, Path]:
    """Return the newest marker of every committed block of a split."""
    found = newest_generations(cache, split)
    return {block: marker_path(cache, split, block, found[block]) for block in sorted(found)}


def newest_generations(cache: Path, split: str) -> dict[int, int]:
    """Return the newest generation of each block's markers, damaged ones included."""
    newest: dict[int, int] = {}
    for block, generation, _ in _markers(cache, split):
        newest[block] = max(newest.get(block, 0), generation)
    return newest


def drop_superseded(cache: Path, split: str) -> None:
    """Remove every marker that has a newer generation."""
    newest = newest_generations(cache, split)
    markers = _markers(cache, split)
    for path in [path for block, generation, path in markers if generation < newest[block]]:
        path.unlink(missing_ok=True)


def _markers(cache: Path, split: str) -> Iterator[tuple[int, int, Path]]:
    """Yield (block, generation, path) of a split's markers, as the folder lists them."""
    folder = cache / COMMITS / split
    with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
        for entry in entries:
            if match := re.fullmatch(r"(\d+)\.(\d+)\.json", entry.name):
                yield int(match[1]), int(match[2]), Path(entry)


class BlockWriter:
    """Stages and commits blocks for one attempt: one run of one process.

    A process that seems dead has its staging folder removed by others (see `clear_staging`). A
    block whose staging folder was removed is never committed, even if the folder is made anew.

    Args:
        cache: the cache's folder.
        attempt: an attempt whose staging folder exists; a new attempt if None.
    """

    def __init__(self, cache: Path, attempt: str | None = None):
        self._cache = cache
        self.attempt = attempt or uuid.uuid4().hex
        self._folder = cache / STAGING / self.attempt
        if attempt is None:
            self._folder.mkdir(parents=True)
        self._opened = os.open(self._folder, os.O_RDONLY)  # identifies this very folder
        self._unpromoted: set[Path] = set()

    def commit(
        self,
        split: str,
        block: int,
        arrays: dict[str, tuple[ArraySpec, np.ndarray[Any, Any]]],
        *,
        quarantined: tuple[int, ...] = (),
        generation: int = 0,
    ) -> Marker:
        """Stage and commit one block. Threads may commit different blocks at the same time.

        Args:
            split: the split's name.
            block: the block's number.
            arrays: by path under the split, the kind of the array and all rows of the block.
            quarantined: numbers (in the split) of sequences that are never read.
            generation: of the marker; above 0 it replaces an earlier one.

        Returns:
            The marker in force: another writer's, if that was first.

        Raises:
            FileNotFoundError: the attempt's staging folder was removed.
        """
        target = marker_path(self._cache, split, block, generation)
        self._begin(target)
        records = tuple(
            self._stage(f"{split}/{name}", block, spec, values)
            for name, (spec, values) in arrays.items()
        )
        marker = self._link(split, block, generation, records, quarantined)
        promote(self._cache, marker)
        self._unpromoted.discard(target)
        if marker.attempt == self.attempt and not _in_place(self._cache, marker):
            target.unlink(missing_ok=True)
            raise self._cleared()
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
        """Commit a block whose files are in place and undamaged, but whose marker was lost."""
        target = marker_path(self._cache, split, block, generation)
        self._begin(target)
        marker = self._link(split, block, generation, files, quarantined)
        self._unpromoted.discard(target)
        return marker

    def _begin(self, target: Path) -> None:
        """Create the file that becomes the marker; raises if the staging folder was removed."""
        self._unwritten(target).touch()
        if not os.path.samestat(os.fstat(self._opened), self._folder.stat()):
            raise self._cleared()

    def _cleared(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "was removed", str(self._folder))

    def _unwritten(self, target: Path) -> Path:
        """Return the path of a marker before it is linked to ``target``."""
        return self._folder / f"{target.parent.name}.{target.name}"

    def _link(
        self,
        split: str,
        block: int,
        generation: int,
        files: tuple[FileRecord, ...],
        quarantined: tuple[int, ...],
    ) -> Marker:
        """Create a marker, exclusively and whole; return the one in force."""
        marker = Marker(
            split=split,
            block=block,
            generation=generation,
            attempt=self.attempt,
            files=files,
            quarantined=quarantined,
        )
        target = marker_path(self._cache, split, block, generation)
        finished = self._unwritten(target)
        with finished.open("r+") as file:  # made by `_begin`: missing if the folder was removed
            file.write(marker.to_json())
        fsync_path(finished)
        make_folder(target.parent)
        try:
            os.link(finished, target)
            self._unpromoted.add(target)
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
        """Remove the attempt's staging folder, unless the files of a committed block are there.

        They are if moving them failed; `recover` moves them later.
        """
        os.close(self._opened)
        if not self._unpromoted:
            shutil.rmtree(self._folder, ignore_errors=True)


def promote(cache: Path, marker: Marker) -> None:
    """Move a marker's files from staging into place; may be repeated."""
    for record in marker.files:
        target = cache / record.path
        make_folder(target.parent)
        with suppress(FileNotFoundError):  # moved before
            (cache / STAGING / marker.attempt / record.path).replace(target)
        fsync_path(target.parent)


def _in_place(cache: Path, marker: Marker) -> bool:
    """Whether all files of a marker are in place and have the recorded size."""
    places = [(cache / record.path, record.bytes) for record in marker.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in places)


def recover(
    cache: Path, split: str, block_count: int, live: Collection[str] = ()
) -> Iterator[Marker]:
    """Move the files of all committed blocks into place; yield their markers, by block.

    A marker whose files are missing (deleted by hand, or lost by the disk) is removed, so that the
    block is computed again. A marker of a ``live`` attempt, which may be moving its files, stays.

    Raises:
        CacheError: a marker is damaged or belongs to another cache.
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
        if _in_place(cache, marker):
            yield marker
        elif marker.attempt not in live:
            path.unlink(missing_ok=True)


def clear_staging(cache: Path, live: Collection[str] = ()) -> None:
    """Remove the staging folders of all but the ``live`` attempts.

    Call after `recover`, which moves the files of committed blocks, with attempts that were found
    live before it. A folder is renamed before it is removed, so that a process which seemed dead
    and wakes finds all that it staged, or nothing.
    """
    staging = cache / STAGING
    for folder in [folder for folder in staging.glob("*") if folder.name not in live]:
        with suppress(FileNotFoundError):  # another process removes it, too
            gone = folder.rename(staging / f"{uuid.uuid4().hex}.gone")
            shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # not empty: in use
        staging.rmdir()
