"""Blocks and their commit markers.

A writer stages a block's shards under its attempt's id, flushes them, then creates the block's
marker exclusively and whole (a hard link of a finished file). The marker names the attempt and each
file's size and hash; only then are the files moved into place, idempotently, by whoever comes
first. A writer that lost the race, or died, can harm nothing.
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
from embedcache.cache.format.layout import COMMITS, STAGING, marker_path, shard_name
from embedcache.cache.manifest.file_record import FileRecord, chunks_crc32c
from embedcache.cache.shards.errors import WAY_OUT
from embedcache.cache.shards.shard import write_shard
from embedcache.errors import CacheError
from embedcache.store.files import fsync_path, hash_json, make_folder


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
        path.unlink(missing_ok=True)


def _markers(cache: Path, split: str) -> Iterator[tuple[int, int, Path]]:
    """Yield (block, generation, path) of a split's markers, as the folder lists them."""
    folder = cache / COMMITS / split
    with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
        for entry in entries:
            if match := re.fullmatch(r"(\d+)\.(\d+)\.json", entry.name):
                yield int(match[1]), int(match[2]), Path(entry)


class BlockWriter:
    """Stages and commits blocks for one attempt (one run of one process), by its id.

    The attempt's staging folder is its licence: whoever takes the process for dead removes it (see
    `clear_staging`), and what was staged in one that is gone is never committed. ``attempt`` is of
    one whose folder is there; without it a new one begins.
    """

    def __init__(self, cache: Path, attempt: str | None = None):
        self._cache = cache
        self.attempt = attempt or uuid.uuid4().hex
        self._folder = cache / STAGING / self.attempt
        if attempt is None:
            self._folder.mkdir(parents=True)
        self._licence = os.open(self._folder, os.O_RDONLY)  # open, it is told from a later one
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
        """Stage ``arrays`` (path under the split → its kind and R rows); commit them as one block.

        Returns the marker that stands: another writer's, where it was first. Safe to call from
        several threads for different blocks. Raises ``FileNotFoundError`` where this attempt was
        taken for dead.
        """
        target = marker_path(self._cache, split, block, generation)
        self._begin(target)
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
        """Commit a block whose files are in place and sound, but whose marker was lost."""
        target = marker_path(self._cache, split, block, generation)
        self._begin(target)
        marker = self._link(
            Marker(
                split=split,
                block=block,
                generation=generation,
                attempt=self.attempt,
                files=files,
                quarantined=quarantined,
            )
        )
        self._unpromoted.discard(target)
        return marker

    def _begin(self, target: Path) -> None:
        """Make the file that is to be the marker; raises where the licence is gone."""
        self._unwritten(target).touch()
        if not os.path.samestat(os.fstat(self._licence), self._folder.stat()):
            raise self._cleared()

    def _cleared(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "was cleared away", str(self._folder))

    def _unwritten(self, target: Path) -> Path:
        """Return where a marker is made before it is linked to ``target``."""
        return self._folder / f"{target.parent.name}.{target.name}"

    def _link(self, marker: Marker) -> Marker:
        """Create a marker, exclusively and whole; return the one that stands."""
        target = marker_path(self._cache, marker.split, marker.block, marker.generation)
        finished = self._unwritten(target)
        with finished.open("r+") as file:  # made before the block was staged: gone if that is
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
        """Remove the attempt's staging folder, unless a committed block waits there.

        One does where its promotion failed: `recover` makes up for that.
        """
        os.close(self._licence)
        if not self._unpromoted:
            shutil.rmtree(self._folder, ignore_errors=True)


def promote(cache: Path, marker: Marker) -> None:
    """Move a marker's files into place where they still lie in staging; safe to repeat."""
    for record in marker.files:
        target = cache / record.path
        make_folder(target.parent)
        with suppress(FileNotFoundError):  # promoted before
            (cache / STAGING / marker.attempt / record.path).replace(target)
        fsync_path(target.parent)


def _in_place(cache: Path, marker: Marker) -> bool:
    """Whether all files of a marker are where they belong, of the size that it states."""
    places = [(cache / record.path, record.bytes) for record in marker.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in places)


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
        if _in_place(cache, marker):
            yield marker
        elif marker.attempt not in live:
            path.unlink(missing_ok=True)


def clear_staging(cache: Path, live: Collection[str] = ()) -> None:
    """Remove what all but the ``live`` attempts staged and never committed.

    Call after `recover`, with attempts that were found live before it: what one committed last,
    and died, is not in place yet. Each folder goes at once: one that was taken for dead and wakes
    up finds all that it staged, or nothing.
    """
    staging = cache / STAGING
    for folder in [folder for folder in staging.glob("*") if folder.name not in live]:
        with suppress(FileNotFoundError):  # another clears up, too
            gone = folder.rename(staging / f"{uuid.uuid4().hex}.gone")
            shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # not empty: in use
        staging.rmdir()
