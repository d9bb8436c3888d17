"""Joining finished caches into a new one.

Blocks are taken over as they are, numbered on; only tables, counts and attributes are written anew.
All is built beside ``out`` and renamed into place.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.arrays import create_arrays
from embedcache.cache.block_files import Recorded
from embedcache.cache.codecs import ARRAYS, codec_name
from embedcache.cache.commit import Marker
from embedcache.cache.layout import (
    ATTRIBUTE,
    SPLITS,
    embedding_shards,
    marker_path,
    token_chunks,
)
from embedcache.cache.manifest import Manifest, publish_manifest, split_manifest
from embedcache.cache.records import FileRecord
from embedcache.cache.seal import create_rows, fsync_tree
from embedcache.cache.sealed import Seal, publish_seal
from embedcache.cache.sealed_files import seal_tree
from embedcache.cache.tables import SplitTables
from embedcache.disk import writing
from embedcache.errors import CacheError, OutputError, UsageError
from embedcache.files import fsync_path, writer_lock
from embedcache.merge_parts import Part, merged_names, require_alike, require_apart
from embedcache.progress import SILENT, Bar, Progress

Array = np.ndarray[Any, Any]

COPY_BYTES = 1 << 22


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
    tables = {split: _join(parts, split, names) for split in SPLITS}
    manifests = [part.cache.manifest for part in parts]
    told = Merged(
        out=str(out),
        caches=tuple(map(str, caches)),
        documents={name: len(table.names) for name, table in tables.items()},
        sequences={name: len(table.rows_S2) for name, table in tables.items()},
        tokens={name: sum(m.splits[name].tokens for m in manifests) for name in SPLITS},
        blocks={name: sum(m.splits[name].blocks for m in manifests) for name in SPLITS},
        bytes=sum(part.bytes for part in parts) + parts[0].shared_bytes,
        renamed=sum(old != new for part in names for old, new in part.items()),
        dry_run=dry_run,
    )
    _require_room(out, told.bytes)
    if dry_run:
        return told
    staging = out.absolute().with_name(f".{out.name}.merging")
    with writing(staging), writer_lock(staging):
        try:
            built = staging / "cache"
            shutil.rmtree(built, ignore_errors=True)
            built.mkdir()
            _Merger(parts, tables, built).run(progress)
            fsync_tree(built)
            built.replace(out)
            fsync_path(out.absolute().parent)
        finally:
            # Zarr may still be at work where it failed: what it leaves goes with the next merge.
            shutil.rmtree(staging, ignore_errors=True)
    return told


def _join(parts: list[Part], split: str, names: list[dict[str, str]]) -> SplitTables:
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
    starts_B = shifted([table.starts_B[:-1] for table in tables], sequences)
    return SplitTables(
        rows_S2=shifted([table.rows_S2 for table in tables], rows),
        document_S=shifted(
            [table.document_S for table in tables], [len(table.names) for table in tables]
        ),
        starts_B=np.append(starts_B, sum(sequences)),
        index_D=shifted([table.index_D for table in tables], indices),
        names=tuple(
            new[name] for table, new in zip(tables, names, strict=True) for name in table.names
        ),
    )


def _require_room(out: Path, needed: int) -> None:
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{out} would take {needed:,} bytes, and its disk has {free:,} free: make room, or "
            "give another --out"
        )


class _Merger:
    """Builds the merged cache in an empty folder."""

    def __init__(self, parts: list[Part], tables: dict[str, SplitTables], built: Path):
        self._parts = parts
        self._tables = tables
        self._built = built
        self._attempt = uuid.uuid4().hex

    def run(self, progress: Progress) -> None:
        first, built = self._parts[0], self._built
        root = zarr.create_group(built, zarr_format=3)
        root.attrs[ATTRIBUTE] = self._attributes()
        total = sum(tokens.blocks for part in self._parts for tokens in part.tokens.values())
        with progress.bar("copying", 2 * total, "blocks") as bar:
            for name in SPLITS:
                self._sealed(root, name, bar)
            seal = seal_tree(built)
            splits = {
                name: split_manifest(
                    built, name, first.settings, self._totals(name), self._blocks(name, bar)
                )
                for name in SPLITS
            }
        vouched = first.cache.manifest
        base, codec = (self._shared(first, shared) for shared in (vouched.base, vouched.codec))
        publish_seal(built, seal)
        manifest = Manifest(
            splits=splits, sealed=seal, base=base, codec=codec, extracted=self._extracted()
        )
        publish_manifest(built, manifest)

    def _attributes(self) -> dict[str, Any]:
        """Return the first part's attributes, with the corpora of all."""
        corpora: list[dict[str, Any]] = []
        for part in self._parts:
            attributes = part.cache.attributes
            about = {
                "manifest": part.cache.manifest.hash,
                "settings": asdict(attributes.settings),
                "environment": attributes.environment,
            }
            corpora += attributes.corpus.get("parts") or [attributes.corpus | about]
        first = self._parts[0].cache.attributes
        return replace(first, corpus={"parts": corpora}).to_dict()

    def _extracted(self) -> dict[str, Any]:
        """Return what the parts' runs saw, together."""
        runs = [part.cache.manifest.extracted for part in self._parts]
        summed = {
            key: sum(run[key] for run in runs)
            for key in ("tokens", "seconds", "predicted_bytes", "predicted_seconds")
        }
        seconds = summed["seconds"]
        return summed | {
            "self_check": max(run["self_check"] for run in runs),
            "tokens_per_second": round(summed["tokens"] / seconds, 1) if seconds else 0.0,
        }

    def _sealed(self, root: zarr.Group, name: str, bar: Bar) -> None:
        """Write a split's tokens, tables, counts and empty arrays."""
        settings = self._parts[0].settings
        blocks = sum(part.tokens[name].blocks for part in self._parts)
        group = root.create_group(name)
        tokens = group.create_group("tokens")
        group.create_group("documents")
        create_rows(tokens, rows=blocks * settings.block_tokens, block_tokens=settings.block_tokens)
        self._tables[name].write(group)
        for tap in settings.taps:
            create_arrays(
                group,
                tap,
                ARRAYS[codec_name(name, settings.codec)],
                blocks=blocks,
                block_tokens=settings.block_tokens,
                hidden=self._parts[0].cache.attributes.base["hidden_size"],
            )
        group.attrs[ATTRIBUTE] = self._totals(name)
        number = 0
        for part in self._parts:
            for block in range(part.tokens[name].blocks):
                new = token_chunks(name, number)
                for record, path in zip(part.sealed[name].tokens(block), new, strict=True):
                    _copy(part.path, record, self._built / path)
                number += 1
                bar.advance(1)

    def _totals(self, name: str) -> dict[str, int]:
        splits = [part.cache.manifest.splits[name] for part in self._parts]
        return {
            key: sum(getattr(split, key) for split in splits)
            for key in ("sequences", "tokens", "targets", "documents")
        }

    def _blocks(self, name: str, bar: Bar) -> Iterator[Recorded]:
        """Copy a split's shards and write their markers; yield what the ledgers hold of each."""
        number, shift = 0, 0
        for part in self._parts:
            manifest = part.cache.manifest.splits[name]
            files = manifest.files(part.path, name, part.settings)
            for block, records in enumerate(files):
                paths = embedding_shards(name, number, part.settings)
                copied = tuple(
                    replace(record, path=path) for record, path in zip(records, paths, strict=True)
                )
                for record, new in zip(records, copied, strict=True):
                    _copy(part.path, record, self._built / new.path)
                aside = tuple((files.aside(*part.tokens[name].bounds(block)) + shift).tolist())
                marker = Marker(
                    split=name,
                    block=number,
                    generation=0,
                    attempt=self._attempt,
                    files=copied,
                    quarantined=aside,
                )
                path = marker_path(self._built, name, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(marker.to_json())
                yield copied, aside
                number += 1
                bar.advance(1)
            shift += manifest.sequences

    def _shared(self, part: Part, seal: Seal) -> Seal:
        """Copy what all parts have the same of."""
        for record in seal.files:
            _copy(part.path, record, self._built / record.path)
        for name, text in seal.metadata.items():
            (self._built / name).parent.mkdir(parents=True, exist_ok=True)
            (self._built / name).write_bytes(text.encode())
        return seal


def _copy(cache: Path, record: FileRecord, target: Path) -> None:
    """Copy a file; raises ``CacheError`` unless its bytes are those that were recorded."""
    target.parent.mkdir(parents=True, exist_ok=True)
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
