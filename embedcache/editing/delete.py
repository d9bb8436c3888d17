"""Taking documents out of a finished cache for good.

Their rows are zeroed in the blocks that hold them, tokens and embeddings alike, and their names and
sequences leave the tables: what is left is numbered anew. All of it is one `rewrite`.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from embedcache.cache.blocks.commit import (
    Marker,
    clear_staging,
    drop_superseded,
    newest_generations,
)
from embedcache.cache.blocks.files import BlockFiles, BlockRecord
from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import (
    ATTRIBUTE,
    MANIFEST,
    ROWS,
    SPLITS,
    block_shards,
    corpora_of,
    marker_path,
    token_chunks,
)
from embedcache.cache.manifest.digests import publish_digests
from embedcache.cache.manifest.file_record import FileRecord, chunks_crc32c
from embedcache.cache.manifest.manifest import SplitManifest, publish_manifest, split_manifest
from embedcache.cache.shards.errors import REPAIR_HINT
from embedcache.cache.shards.shard import read_chunk, read_shard, write_chunk, write_shard
from embedcache.cache.tokens.files import write_changed_digests
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.tables import SplitTables
from embedcache.cache.verify import verify_idle
from embedcache.errors import CacheError, UsageError, nearest
from embedcache.progress import SILENT, Bar, Progress
from embedcache.store.files import translate_write_errors
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import begin_transaction, commit_transaction, finish_transaction

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What was deleted, or would be: ``blocks`` are those rewritten, ``documents`` names."""

    cache: str
    documents: tuple[str, ...]
    sequences: dict[str, int]
    """By split, as the two that follow."""
    tokens: dict[str, int]
    blocks: dict[str, int]
    dry_run: bool


def delete(
    cache: Path, documents: Sequence[str], *, dry_run: bool = False, progress: Progress = SILENT
) -> Deletion:
    """Delete documents from a finished cache, by name: no byte of them is left in its files.

    A name is also that of every piece (``name#1``, …) of a file that was cut. A deletion that was
    killed is finished first; then names that went with it are no error.

    Raises:
        UsageError: for a name that the cache does not have, or where nothing would be left in
            train.
        CacheError: for a cache that is incomplete or damaged; it is left as it was.
    """
    if dry_run:
        return _plan(cache, documents, dry_run=True).told
    read_attributes(cache)
    leases = Leases(cache)
    with translate_write_errors(cache), leases:
        leases.require_alone("delete")
        with leases.coordinating(progress):
            leases.require_alone("delete")  # one may have come to wait just now
            return _delete(cache, documents, leases, progress)


def _delete(cache: Path, documents: Sequence[str], leases: Leases, progress: Progress) -> Deletion:
    """Delete with the cache to itself."""
    finished = (finish_transaction(cache) or {}).get("deleted")
    if finished is not None:
        progress.say(f"finished deleting {', '.join(finished['documents'])}")
        documents = [name for name in documents if name not in finished["asked"]]
        if not documents:
            finished.pop("asked")
            _tidy(cache)
            return Deletion(**finished | {"documents": tuple(finished["documents"])})
    found = verify_idle(cache, progress=progress)
    if found.faults:
        raise CacheError(
            f"{cache} is damaged ({found.faults[0]}): nothing was deleted. {REPAIR_HINT}"
        )
    plan = _plan(cache, documents, dry_run=False)
    clear_staging(cache)
    try:
        _Deleter(plan, leases).run(progress)
    finally:
        shutil.rmtree(leases.staging, ignore_errors=True)
    _tidy(cache)
    return plan.told


def _tidy(cache: Path) -> None:
    """Remove what dead attempts and earlier generations left, which may hold what was deleted."""
    for split in SPLITS:
        drop_superseded(cache, split)
    clear_staging(cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SplitPlan:
    """A split that loses something. ``gone_S`` and ``gone_D`` are masks over its tables."""

    tokens: SplitTokens
    tables: SplitTables
    gone_S: Array
    gone_D: Array

    @property
    def blocks(self) -> list[int]:
        """Blocks with rows to be zeroed."""
        return np.unique(self.tables.block_of(np.flatnonzero(self.gone_S))).tolist()

    def rows(self, block: int) -> Array:
        """Return rows_S2, within the block, of its sequences that go."""
        first, stop = self.tables.block_starts[block : block + 2].tolist()
        return self.tokens.offsets(block)[self.gone_S[first:stop]]

    def renumbered(self, sequences: Sequence[int]) -> tuple[int, ...]:
        """Return the new numbers of those sequences that stay."""
        number_S = np.cumsum(~self.gone_S) - 1
        return tuple(int(number_S[s]) for s in sequences if not self.gone_S[s])

    def kept(self) -> SplitTables:
        """Return the tables of what stays; blocks stay where they are."""
        tables, kept_S, kept_D = self.tables, ~self.gone_S, ~self.gone_D
        return SplitTables(
            rows_S2=tables.rows_S2[kept_S],
            document_S=(np.cumsum(kept_D) - 1)[tables.document_S[kept_S]],
            block_starts=np.concatenate([[0], np.cumsum(kept_S)])[tables.block_starts],
            index_D=tables.index_D[kept_D],
            fingerprints=tables.fingerprints[kept_D],
            names=tuple(n for n, kept in zip(tables.names, kept_D, strict=True) if kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be done to a cache; ``told`` is what the caller hears of it."""

    cache: Cache
    asked: tuple[str, ...]
    splits: dict[str, _SplitPlan]
    told: Deletion


def _plan(path: Path, documents: Sequence[str], *, dry_run: bool) -> _Plan:
    cache = Cache(path)
    tables: dict[str, tuple[SplitTokens, SplitTables]] = {}
    for name in SPLITS:
        tokens = SplitTokens(path, name, cache.attributes.settings.block_tokens)
        tables[name] = tokens, SplitTables.read(tokens)
    known = {name for _, split in tables.values() for name in split.names}
    whole = {re.sub(r"#\d+$", "", name) for name in known}
    for name in documents:
        if name not in known | whole:
            raise UsageError(
                f"{path} has no document '{name}' (it has {len(known):,})."
                f"{nearest(name, known)} Names are those that 'embedcache inspect' shows. Nothing "
                "was deleted."
            )
    asked = set(documents)
    splits = {}
    for name, (tokens, split) in tables.items():
        gone_D = np.array(
            [n in asked or re.sub(r"#\d+$", "", n) in asked for n in split.names], dtype=bool
        )
        if gone_D.any():
            gone_S = gone_D[split.document_S]
            splits[name] = _SplitPlan(tokens=tokens, tables=split, gone_S=gone_S, gone_D=gone_D)
    if "train" in splits and splits["train"].gone_S.all():
        raise UsageError(
            f"nothing would be left to train on in {path}, expected a train document to stay. "
            f"Remove the cache itself: rm -r {path}"
        )
    lengths = {n: s.tables.rows_S2[s.gone_S] @ np.array([-1, 1]) for n, s in splits.items()}
    told = Deletion(
        cache=str(path),
        documents=tuple(
            sorted({s.tables.names[d] for s in splits.values() for d in np.flatnonzero(s.gone_D)})
        ),
        sequences={name: int(split.gone_S.sum()) for name, split in splits.items()},
        tokens={name: int(length_S.sum()) for name, length_S in lengths.items()},
        blocks={name: len(split.blocks) for name, split in splits.items()},
        dry_run=dry_run,
    )
    return _Plan(cache=cache, asked=tuple(documents), splits=splits, told=told)


class _Deleter:
    """Stages every file that changes, then commits them as one."""

    def __init__(self, plan: _Plan, leases: Leases):
        self._plan = plan
        self._leases = leases
        self._cache = plan.cache.path
        self._settings = plan.cache.attributes.settings
        self._staged = begin_transaction(leases.staging)
        self._attempt = uuid.uuid4().hex

    def run(self, progress: Progress) -> None:
        plan, manifest = self._plan, self._plan.cache.manifest
        root = zarr.create_group(self._staged, zarr_format=3)
        root.attrs[ATTRIBUTE] = self._attributes()
        splits = dict(manifest.splits)
        with progress.bar("rewriting", sum(plan.told.blocks.values()), "blocks") as bar:
            for name, split in plan.splits.items():
                splits[name] = self._split(root, name, split, bar)
        seal, remove = write_changed_digests(self._cache, self._staged, manifest.tokens)
        publish_digests(self._staged, seal)
        publish_manifest(self._staged, replace(manifest, splits=splits, tokens=seal))
        about = asdict(plan.told) | {"asked": plan.asked}
        self._leases.require(COORDINATOR)
        commit_transaction(
            self._cache,
            self._leases.staging,
            last=MANIFEST,
            remove=remove,
            about={"deleted": about},
        )

    def _attributes(self) -> dict[str, Any]:
        """Return the root attributes: how much was deleted is added, and no source names it."""
        attributes = self._plan.cache.attributes.to_dict()
        corpus = json.loads(json.dumps(attributes["corpus"]))
        told = self._plan.told
        names = {*told.documents, *self._plan.asked}
        earlier = corpus.get("deleted", {"documents": 0, "sequences": 0, "tokens": 0})
        corpus["deleted"] = {
            "documents": earlier["documents"] + len(told.documents),
            "sequences": earlier["sequences"] + sum(told.sequences.values()),
            "tokens": earlier["tokens"] + sum(told.tokens.values()),
        }
        for part in corpora_of(corpus):
            for key in ("sources", "dev_sources", "test_sources"):
                part["config"][key] = [
                    "(deleted)" if _names_one(source, names) else source
                    for source in part["config"].get(key) or ()
                ]
        return attributes | {"corpus": corpus}

    def _split(self, root: zarr.Group, name: str, split: _SplitPlan, bar: Bar) -> SplitManifest:
        """Stage a split's blocks, markers, tables and counts; return what the manifest says."""
        manifest = self._plan.cache.manifest.splits[name]
        changed: dict[int, tuple[FileRecord, ...]] = {}
        files, targets = manifest.files(self._cache, name, self._settings), 0
        for block in split.blocks:
            targets += self._tokens(name, block, split.rows(block))
            changed[block] = tuple(
                self._shard(name, block, record, split.rows(block)) for record in files[block]
            )
            bar.advance(1)
        tables = split.kept()
        totals = {
            "sequences": len(tables.rows_S2),
            "tokens": manifest.tokens - self._plan.told.tokens[name],
            "targets": manifest.targets - targets,
            "documents": len(tables.names),
        }
        group = root.create_group(name)
        for folder in ("tokens", "documents"):
            group.create_group(folder)
        tables.write(group)
        group.attrs[ATTRIBUTE] = totals
        blocks = self._blocks(name, split, files, changed)
        return split_manifest(self._staged, name, self._settings, totals, blocks)

    def _blocks(
        self,
        name: str,
        split: _SplitPlan,
        files: BlockFiles,
        changed: dict[int, tuple[FileRecord, ...]],
    ) -> Iterator[BlockRecord]:
        """Yield the records of each block for the digest tables; stage a marker if they are new."""
        newest = newest_generations(self._cache, name)
        for block, old in enumerate(files):
            aside = files.quarantined_in(
                *split.tables.block_starts[block : block + 2].tolist()
            ).tolist()
            records, renumbered = changed.get(block, old), split.renumbered(aside)
            if block in changed or [*renumbered] != aside:
                marker = Marker(
                    split=name,
                    block=block,
                    generation=newest.get(block, -1) + 1,
                    attempt=self._attempt,
                    files=records,
                    quarantined=renumbered,
                )
                path = marker_path(self._staged, name, block, marker.generation)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(marker.to_json())
            yield records, renumbered

    def _tokens(self, name: str, block: int, rows_S2: Array) -> int:
        """Stage a block's tokens without some sequences; return how many targets those had."""
        rows, targets = self._settings.block_tokens, 0
        for path, (dtype, columns) in zip(token_chunks(name, block), ROWS.values(), strict=True):
            values = read_chunk(
                self._cache / path, shape=(rows, *columns), dtype=dtype, coder=CODERS["blosc"]
            )
            for first, stop in rows_S2.tolist():
                targets += int(values[first:stop].sum()) if dtype == "bool" else 0
                values[first:stop] = 0
            write_chunk(self._staged / path, values, CODERS["blosc"])
        return targets

    def _shard(self, name: str, block: int, record: FileRecord, rows_S2: Array) -> FileRecord:
        """Stage a shard without some sequences."""
        settings = self._settings
        spec = block_shards(name, block, settings)[record.path]
        rows, size = settings.block_tokens, chunk_rows(spec, settings.block_tokens)
        hidden = self._plan.cache.attributes.base["hidden_size"]
        values = read_shard(
            self._cache / record.path,
            rows=rows,
            columns=spec.columns(hidden),
            dtype=spec.dtype,
            chunk_rows=size,
            chunks=rows // size,
            coder=CODERS[spec.coder],
        )
        for first, stop in rows_S2.tolist():
            values[first:stop] = 0
        path = self._staged / record.path
        length, digest = write_shard(path, values, size, CODERS[spec.coder])
        crc32c = chunks_crc32c(path, rows // size)
        return FileRecord(path=record.path, bytes=length, sha256=digest, crc32c=crc32c)


def _names_one(source: str, names: set[str]) -> bool:
    """Whether a source is itself one of the documents, by the end of its path."""
    return any(source == name or source.endswith(f"/{name}") for name in names)
