"""An edit of a finished cache: the part that `append`, `merge` and `delete` share.

An edit stages the blocks that are new or changed, and a new set of tables, digest tables, commit
markers and manifest. `append` and `delete` commit the staged files by one transaction
(`embedcache.store.transaction`), so that a process killed at any moment leaves the old cache or the
new one. `merge` stages a whole cache and renames its folder.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from embedcache.cache.blocks.commit import Marker, clear_staging
from embedcache.cache.blocks.files import BlockRecord
from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.format.arrays import create_arrays
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    MANIFEST,
    SPLITS,
    CacheAttributes,
    block_arrays,
    marker_path,
)
from embedcache.cache.manifest.digests import Digests, publish_digests
from embedcache.cache.manifest.file_record import FileRecord
from embedcache.cache.manifest.manifest import (
    Manifest,
    SplitManifest,
    publish_manifest,
    split_manifest,
)
from embedcache.cache.tokens.files import TokenFiles, write_changed_digests, write_tokens_digests
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.tables import SplitTables
from embedcache.cache.tokens.writer import create_rows
from embedcache.progress import Progress
from embedcache.store.files import translate_write_errors
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import begin_transaction, commit_transaction, finish_transaction

TOTALS = ("sequences", "tokens", "targets", "documents")
"""The counts that a split and its manifest state."""


def file_of(document: str) -> str:
    """Return the name of the file that a document is, or is a piece of.

    >>> file_of("log.txt#3"), file_of("log.txt")
    ('log.txt', 'log.txt')
    """
    return re.sub(r"#\d+$", "", document)


class FinishedCache:
    """A finished cache, opened to be edited: the tables of all splits are in memory.

    Args:
        path: the cache.

    Raises:
        CacheError: if the cache is incomplete, or its metadata, tables or base are damaged.
    """

    def __init__(self, path: Path):
        cache = Cache(path)
        self.path = path
        self.attributes: CacheAttributes = cache.attributes
        self.manifest: Manifest = cache.manifest
        self.settings = cache.attributes.settings
        self.token_files = {name: TokenFiles(path, name, cache.manifest.tokens) for name in SPLITS}
        self.tokens = {
            name: SplitTokens(path, name, self.settings.block_tokens, self.token_files[name])
            for name in SPLITS
        }
        self.tables = {name: SplitTables.read(tokens) for name, tokens in self.tokens.items()}

    def blocks(self, split: str) -> Iterator[BlockRecord]:
        """Yield the shards and the quarantined sequences of each block of a split, in order."""
        block_starts = self.tables[split].block_starts
        files = self.manifest.splits[split].files(self.path, split, self.settings)
        for block, records in enumerate(files):
            yield (
                records,
                tuple(files.quarantined_in(*block_starts[block : block + 2].tolist()).tolist()),
            )

    def totals(self, split: str) -> dict[str, int]:
        """Return the `TOTALS` of a split."""
        return {key: getattr(self.manifest.splits[split], key) for key in TOTALS}


@dataclass(frozen=True, slots=True)
class EditedBlock:
    """A block of an edited cache: its shards and its quarantined sequences.

    ``generation`` is that of its new commit marker. None keeps the marker that the cache has.
    """

    files: tuple[FileRecord, ...]
    quarantined: tuple[int, ...]
    generation: int | None


class StagedCache:
    """The files of an edited cache in a staging folder, by their paths inside the cache.

    Args:
        folder: an empty folder.
        attributes: the root attributes of the edited cache.
        onto: the cache that is edited. Its files stay wherever the staging folder has no file of
            the same path. None if the staging folder is to be a whole cache.
    """

    def __init__(self, folder: Path, attributes: CacheAttributes, onto: FinishedCache | None):
        self.folder = folder
        self.onto = onto
        self._attributes = attributes
        self._root = zarr.create_group(folder, zarr_format=3)
        self._root.attrs[ATTRIBUTE] = attributes.to_dict()
        self._splits: dict[str, SplitManifest] = {} if onto is None else {**onto.manifest.splits}
        self._attempt = uuid.uuid4().hex

    def write_split(
        self, name: str, tables: SplitTables, totals: dict[str, int], blocks: Iterable[EditedBlock]
    ) -> None:
        """Write a split's metadata, tables, commit markers and the digest tables of its blocks.

        Args:
            name: the split.
            tables: its tables after the edit.
            totals: its `TOTALS` after the edit.
            blocks: its blocks after the edit, in order. The token chunks and shards of a block are
                staged by the time that the iterable yields it.
        """
        settings = self._attributes.settings
        count = len(tables.block_starts) - 1
        group = self._root.create_group(name)
        group.create_group("documents")
        create_rows(
            group.create_group("tokens"),
            rows=count * settings.block_tokens,
            block_tokens=settings.block_tokens,
        )
        tables.write(group)
        create_arrays(
            group,
            block_arrays(name, settings),
            blocks=count,
            block_tokens=settings.block_tokens,
            hidden=self._attributes.base["hidden_size"],
        )
        group.attrs[ATTRIBUTE] = totals
        recorded = self._write_markers(name, blocks)
        self._splits[name] = split_manifest(self.folder, name, settings, totals, recorded)

    def _write_markers(self, split: str, blocks: Iterable[EditedBlock]) -> Iterator[BlockRecord]:
        """Write the new commit markers; yield the records of each block."""
        for number, block in enumerate(blocks):
            if block.generation is not None:
                marker = Marker(
                    split=split,
                    block=number,
                    generation=block.generation,
                    attempt=self._attempt,
                    files=block.files,
                    quarantined=block.quarantined,
                )
                path = marker_path(self.folder, split, number, block.generation)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(marker.to_json())
            yield block.files, block.quarantined

    def publish(self, *, base: Digests, codec: Digests, extracted: dict[str, Any]) -> list[str]:
        """Write the digest tables of the tokens and, last, the manifest.

        Args:
            base: the digests of the base's arrays.
            codec: the digests of the codec's calibration.
            extracted: the measurements of the extraction that the manifest records.

        Returns:
            The files, by path inside the cache, that no array of the edited cache uses any more.
        """
        unused: list[str] = []
        if self.onto is None:
            tokens = write_tokens_digests(self.folder)
        else:
            tokens, unused = write_changed_digests(
                self.onto.path, self.folder, self.onto.manifest.tokens
            )
        publish_digests(self.folder, tokens)
        manifest = Manifest(
            splits=self._splits, tokens=tokens, base=base, codec=codec, extracted=extracted
        )
        publish_manifest(self.folder, manifest)
        return unused


@contextmanager
def sole_writer(
    cache: Path, verb: str, progress: Progress
) -> Iterator[tuple[Leases, dict[str, Any]]]:
    """Hold a cache alone, for an edit of it in the block.

    Args:
        cache: the cache.
        verb: the name of the edit, for messages.
        progress: receives a remark where an interrupted edit is finished first.

    Yields:
        The leases of this process, and what the interrupted edit recorded about itself: its
        ``verb``, ``request`` and ``result``. It is empty if no edit was interrupted.

    Raises:
        CacheError: if ``cache`` is no cache.
        OutputError: if another process writes the cache.
    """
    read_attributes(cache)
    leases = Leases(cache)
    with translate_write_errors(cache), leases:
        leases.require_alone(verb)
        with leases.coordinating(progress):
            leases.require_alone(verb)  # another process may wait for its turn by now
            finished = finish_transaction(cache)
            if finished is not None:
                progress.say(f"finished the interrupted {finished['verb']} on {cache}")
            yield leases, finished or {}


@contextmanager
def staged_edit(
    cache: FinishedCache,
    attributes: CacheAttributes,
    leases: Leases,
    *,
    about: dict[str, Any],
    extracted: dict[str, Any] | None = None,
    keep: Collection[str] = (),
) -> Iterator[StagedCache]:
    """Stage an edit of a cache in the block, and commit it at the end of the block.

    An exception in the block, or a kill before the commit, leaves the cache as it was.

    Args:
        cache: the cache.
        attributes: its root attributes after the edit.
        leases: the leases of this process, which is the only writer (`sole_writer`).
        about: the ``verb``, ``request`` and ``result`` of the edit, for the process that finishes
            it if this one is killed after the commit.
        extracted: the measurements for the manifest; those of ``cache`` by default.
        keep: the staging folders, by name, that are not cleared before the edit.

    Raises:
        OutputError: if another process has taken over, because this one stood still.
    """
    clear_staging(cache.path, keep)
    try:
        staged = StagedCache(begin_transaction(leases.staging), attributes, cache)
        yield staged
        manifest = cache.manifest
        unused = staged.publish(
            base=manifest.base,
            codec=manifest.codec,
            extracted=manifest.extracted if extracted is None else extracted,
        )
        leases.require(COORDINATOR)
        commit_transaction(cache.path, leases.staging, last=MANIFEST, remove=unused, about=about)
    finally:
        shutil.rmtree(leases.staging, ignore_errors=True)
