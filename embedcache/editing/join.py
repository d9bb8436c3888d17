"""Finished caches joined block by block: into a new one, or onto the first of them.

Blocks are taken over as they are, numbered on; only tables, counts and attributes are written anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.blocks.files import BlockRecord
from embedcache.cache.format.arrays import create_arrays
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    CODEC,
    SPLITS,
    CacheAttributes,
    block_arrays,
    block_shards,
    marker_path,
    token_chunks,
)
from embedcache.cache.manifest.digests import Digests, publish_digests
from embedcache.cache.manifest.file_record import FileRecord, content_fault
from embedcache.cache.manifest.manifest import Manifest, publish_manifest, split_manifest
from embedcache.cache.tokens.files import write_changed_digests, write_tokens_digests
from embedcache.cache.tokens.tables import SplitTables
from embedcache.cache.tokens.writer import create_rows
from embedcache.editing.merge_parts import Part
from embedcache.errors import CacheError
from embedcache.progress import Bar, Progress
from embedcache.store.files import copy_tree

Array = np.ndarray[Any, Any]

COPY_BYTES = 1 << 22


def join(
    parts: list[Part],
    names: list[dict[str, str]],
    built: Path,
    attributes: CacheAttributes,
    progress: Progress,
    *,
    onto_first: bool = False,
    about: dict[str, Any] | None = None,
) -> None:
    """Build, in the empty folder ``built``, the cache that holds all parts' blocks in their order.

    Args:
        parts: finished caches of one base, codec and settings.
        names: of each part's documents, by the names that they have now.
        built: where to. Files are copied there.
        attributes: of the joined cache.
        progress: told of every block.
        onto_first: build only what the first part lacks or has otherwise: to be put in place there.
            Files of the others are linked, not copied.
        about: what else the manifest shall tell of how the cache was made.

    Raises:
        CacheError: where a part is damaged.
    """
    _Joiner(parts, names, built, onto_first).run(attributes, about or {}, progress)


class _Joiner:
    def __init__(
        self, parts: list[Part], names: list[dict[str, str]], built: Path, onto_first: bool
    ):
        self._parts = parts
        self._names = names
        self._built = built
        self._kept = parts[0] if onto_first else None
        """The part whose blocks are in place."""
        self._attempt = uuid.uuid4().hex

    def run(self, attributes: CacheAttributes, about: dict[str, Any], progress: Progress) -> None:
        first, built = self._parts[0], self._built
        was = first.cache.manifest
        root = zarr.create_group(built, zarr_format=3)
        root.attrs[ATTRIBUTE] = attributes.to_dict()
        new = [part for part in self._parts if part is not self._kept]
        total = sum(tokens.blocks for part in new for tokens in part.tokens.values())
        with progress.bar("joining", 2 * total, "blocks") as bar:
            for name in SPLITS:
                self._seal(root, name, bar)
            if self._kept is None:
                seal = write_tokens_digests(built)
            else:  # nothing goes: tables only grow
                seal, _ = write_changed_digests(first.path, built, was.tokens)
            splits = {
                name: split_manifest(
                    built, name, first.settings, self._totals(name), self._blocks(name, bar)
                )
                for name in SPLITS
            }
        publish_digests(built, seal)
        manifest = Manifest(
            splits=splits,
            tokens=seal,
            base=self._folder("base", was.base),
            codec=self._folder(CODEC, was.codec),
            extracted=self._extracted() | about,
        )
        publish_manifest(built, manifest)

    def _seal(self, root: zarr.Group, name: str, bar: Bar) -> None:
        """Write a split's tokens, tables, counts and empty arrays."""
        settings = self._parts[0].settings
        blocks = sum(part.tokens[name].blocks for part in self._parts)
        group = root.create_group(name)
        tokens = group.create_group("tokens")
        group.create_group("documents")
        create_rows(tokens, rows=blocks * settings.block_tokens, block_tokens=settings.block_tokens)
        _joined_tables(self._parts, name, self._names).write(group)
        create_arrays(
            group,
            block_arrays(name, settings),
            blocks=blocks,
            block_tokens=settings.block_tokens,
            hidden=self._parts[0].cache.attributes.base["hidden_size"],
        )
        group.attrs[ATTRIBUTE] = self._totals(name)
        number = 0
        for part in self._parts:
            for block in range(part.tokens[name].blocks):
                if part is not self._kept:
                    new = token_chunks(name, number)
                    for record, path in zip(part.sealed[name].tokens(block), new, strict=True):
                        self._take(part, record, path)
                    bar.advance(1)
                number += 1

    def _totals(self, name: str) -> dict[str, int]:
        splits = [part.cache.manifest.splits[name] for part in self._parts]
        return {
            key: sum(getattr(split, key) for split in splits)
            for key in ("sequences", "tokens", "targets", "documents")
        }

    def _blocks(self, name: str, bar: Bar) -> Iterator[BlockRecord]:
        """Take a split's shards and write their markers; yield the records of each block."""
        number, shift = 0, 0
        for part in self._parts:
            manifest = part.cache.manifest.splits[name]
            files = manifest.files(part.path, name, part.settings)
            for block, records in enumerate(files):
                aside = tuple(
                    (files.quarantined_in(*part.tokens[name].bounds(block)) + shift).tolist()
                )
                if part is self._kept:
                    yield records, aside
                else:
                    yield self._take_block(part, name, records, number, aside), aside
                    bar.advance(1)
                number += 1
            shift += manifest.sequences

    def _take_block(
        self,
        part: Part,
        name: str,
        records: tuple[FileRecord, ...],
        number: int,
        aside: tuple[int, ...],
    ) -> tuple[FileRecord, ...]:
        """Take a block's shards under its new number and write its marker; return their records."""
        paths = block_shards(name, number, part.settings)
        taken = tuple(replace(r, path=path) for r, path in zip(records, paths, strict=True))
        for record, new in zip(records, taken, strict=True):
            self._take(part, record, new.path)
        marker = Marker(
            split=name,
            block=number,
            generation=0,
            attempt=self._attempt,
            files=taken,
            quarantined=aside,
        )
        path = marker_path(self._built, name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(marker.to_json())
        return taken

    def _take(self, part: Part, record: FileRecord, name: str) -> None:
        """Put a part's file under another name, once it is found to be what was recorded."""
        target = self._built / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._kept is None:
            _copy(part.path, record, target)
        elif (fault := content_fault(part.path, record)) is None:
            os.link(part.path / record.path, target)
        else:
            raise CacheError(
                f"{part.path / record.path} {fault}: nothing was added. Type: rm -r {part.path}, "
                "then the same again"
            )

    def _folder(self, name: str, vouched: Digests) -> Digests:
        """Copy what all parts have the same of, where it is not in place."""
        if self._kept is not None:
            return vouched
        first = self._parts[0].path
        copy_tree(first / name, self._built / name, shutil.copyfile)
        seal = Digests.of(self._built, self._built / name)
        if seal != vouched:
            raise CacheError(
                f"{first / name} is damaged: run 'embedcache verify {first}', then the same "
                "'embedcache extract' with --repair. Nothing was merged."
            )
        return seal

    def _extracted(self) -> dict[str, Any]:
        """Return what the parts' runs saw, together; what they share is written once."""
        runs = [part.cache.manifest.extracted for part in self._parts]
        summed = {key: sum(run[key] for run in runs) for key in ("tokens", "seconds")}
        shared = sum(part.shared_bytes for part in self._parts[1:])
        seconds = summed["seconds"]
        return summed | {
            "self_check": max(run["self_check"] for run in runs),
            "tokens_per_second": round(summed["tokens"] / seconds, 1) if seconds else 0.0,
            "predicted_bytes": sum(run["predicted_bytes"] for run in runs) - shared,
            "predicted_seconds": sum(run["predicted_seconds"] for run in runs),
        }


def _joined_tables(parts: list[Part], split: str, names: list[dict[str, str]]) -> SplitTables:
    """Return the tables of the parts one after the other."""
    tables = [part.tables[split] for part in parts]
    rows = [part.tokens[split].blocks * part.settings.block_tokens for part in parts]
    indices = [
        1 + max((int(t.index_D.max(initial=-1)) for t in part.tables.values()), default=-1)
        for part in parts
    ]

    def shifted(values: list[Array], by: list[int]) -> Array:
        starts = np.cumsum([0, *by[:-1]])
        return np.concatenate([v + start for v, start in zip(values, starts, strict=True)])

    sequences = [len(table.rows_S2) for table in tables]
    block_starts = shifted([table.block_starts[:-1] for table in tables], sequences)
    return SplitTables(
        rows_S2=shifted([table.rows_S2 for table in tables], rows),
        document_S=shifted(
            [table.document_S for table in tables], [len(table.names) for table in tables]
        ),
        block_starts=np.append(block_starts, sum(sequences)),
        index_D=shifted([table.index_D for table in tables], indices),
        fingerprints=np.concatenate([table.fingerprints for table in tables]),
        names=tuple(
            new[name] for table, new in zip(tables, names, strict=True) for name in table.names
        ),
    )


def _copy(cache: Path, record: FileRecord, target: Path) -> None:
    """Copy a file; raises ``CacheError`` unless its bytes are those that were recorded."""
    digest = hashlib.sha256()
    try:
        with (cache / record.path).open("rb") as source, target.open("wb") as copy:
            while data := source.read(COPY_BYTES):
                digest.update(data)
                copy.write(data)
    except FileNotFoundError:
        digest.update(b"missing")
    if digest.hexdigest() != record.sha256:
        raise CacheError(
            f"{cache / record.path} is damaged: run 'embedcache verify {cache} --deep', then the "
            "same 'embedcache extract' with --repair. Nothing was merged."
        )
