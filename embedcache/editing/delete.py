"""Deleting documents from a finished cache.

Tokens and embeddings of the documents are zeroed in the blocks that hold them. Their sequences and
names leave the tables, and the remaining ones are renumbered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.blocks.commit import clear_staging, drop_superseded, newest_generations
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.arrays import chunk_rows
from embedcache.cache.format.layout import (
    ROWS,
    SPLITS,
    CacheAttributes,
    block_shards,
    corpora_of,
)
from embedcache.cache.manifest.file_record import FileRecord, chunks_crc32c
from embedcache.cache.shards.shard import read_chunk, read_shard, write_chunk, write_shard
from embedcache.cache.tokens.files import chunk_name
from embedcache.cache.tokens.tables import SplitTables
from embedcache.editing.edit import (
    EditedBlock,
    FinishedCache,
    StagedCache,
    file_of,
    sole_writer,
    staged_edit,
)
from embedcache.errors import CacheError, UsageError, nearest
from embedcache.progress import SILENT, Bar, Progress

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteSummary:
    """The documents that were deleted, or that a dry run would delete."""

    cache: str
    documents: tuple[str, ...]
    """Names of the deleted documents, sorted."""
    sequences: dict[str, int]
    """By split, like the two counts that follow."""
    tokens: dict[str, int]
    blocks: dict[str, int]
    """Blocks that are rewritten."""
    dry_run: bool


def delete(
    cache: str | Path,
    documents: str | Sequence[str],
    *,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> DeleteSummary:
    """Delete documents from a finished cache: no byte of them is left in its files.

    Every document of a name is deleted, in all splits. Training runs that were begun before need
    the cache as it was. What was computed from many documents together stays: the calibration of
    the codec ``transform``, and carry-ons. An interrupted deletion is finished by the same call.

    Args:
        cache: the cache.
        documents: one or more names. The name of a large file that was cut stands for all of its
            pieces (``name#1``, …).
        dry_run: return the summary, but write nothing.
        progress: receives a bar over the blocks that are rewritten.

    Returns:
        The names and the counts of the deleted documents.

    Raises:
        UsageError: if the cache has no document of a name, or if no document of train would be
            left.
        OutputError: if another process writes the cache.
        CacheError: if the cache is incomplete, or if its tables or a block that has to be
            rewritten are damaged. The cache is as it was then.
    """
    path = Path(cache)
    names = [documents] if isinstance(documents, str) else list(documents)
    if dry_run:
        return _Deletion(FinishedCache(path), names).summary(dry_run=True)
    with sole_writer(path, "delete", progress) as (leases, finished):
        if finished.get("verb") == "delete":
            names = [name for name in names if name not in finished["request"]]
            if not names:
                _remove_leftovers(path)
                result = finished["result"]
                return DeleteSummary(**result | {"documents": tuple(result["documents"])})
        deletion = _Deletion(FinishedCache(path), names)
        summary = deletion.summary()
        about = {"verb": "delete", "request": names, "result": asdict(summary)}
        attributes = deletion.attributes()
        try:
            with staged_edit(deletion.cache, attributes, leases, about=about) as staged:
                deletion.stage(staged, progress)
        except CacheError as error:
            raise CacheError(f"nothing was deleted: {error}") from error
        _remove_leftovers(path)
    return summary


def _remove_leftovers(cache: Path) -> None:
    """Remove staging folders and superseded markers, which may name deleted documents."""
    for split in SPLITS:
        drop_superseded(cache, split)
    clear_staging(cache)


class _Split:
    """A split that loses documents: ``gone_S`` and ``gone_D`` are masks over its tables."""

    def __init__(self, tables: SplitTables, gone_D: Array):
        self.tables = tables
        self.gone_D = gone_D
        self.gone_S: Array = gone_D[tables.document_S]
        self.blocks: list[int] = np.unique(tables.block_of(np.flatnonzero(self.gone_S))).tolist()
        """The blocks that hold deleted sequences."""
        self.tokens = int((tables.rows_S2[self.gone_S] @ np.array([-1, 1])).sum())

    def rows(self, block: int, block_tokens: int) -> list[list[int]]:
        """Return the first row and the row past the last, in a block, of its deleted sequences."""
        span = slice(*self.tables.block_starts[block : block + 2].tolist())
        rows_S2 = self.tables.rows_S2[span][self.gone_S[span]] - block * block_tokens
        return rows_S2.tolist()

    def renumbered(self, sequences: Sequence[int]) -> tuple[int, ...]:
        """Return the new numbers of those of the sequences that stay."""
        number_S = np.cumsum(~self.gone_S) - 1
        return tuple(int(number_S[s]) for s in sequences if not self.gone_S[s])

    def kept_tables(self) -> SplitTables:
        """Return the tables of the documents that stay. Blocks and rows stay where they are."""
        tables, kept_S, kept_D = self.tables, ~self.gone_S, ~self.gone_D
        return SplitTables(
            rows_S2=tables.rows_S2[kept_S],
            document_S=(np.cumsum(kept_D) - 1)[tables.document_S[kept_S]],
            block_starts=np.concatenate([[0], np.cumsum(kept_S)])[tables.block_starts],
            index_D=tables.index_D[kept_D],
            fingerprints=tables.fingerprints[kept_D],
            names=tuple(n for n, kept in zip(tables.names, kept_D, strict=True) if kept),
        )


class _Deletion:
    """The deletion of documents from one cache; the request is checked when it is made."""

    def __init__(self, cache: FinishedCache, names: list[str]):
        self.cache = cache
        self._names = names
        known = {name for tables in cache.tables.values() for name in tables.names}
        for name in names:
            if name not in known and name not in {*map(file_of, known)}:
                raise UsageError(
                    f"{cache.path} has no document '{name}'.{nearest(name, known)} It has "
                    f"{len(known):,} documents; `embedcache.inspect()` shows their names. Nothing "
                    "was deleted."
                )
        self._splits: dict[str, _Split] = {}
        for split, tables in cache.tables.items():
            gone = [name in names or file_of(name) in names for name in tables.names]
            if any(gone):
                self._splits[split] = _Split(tables, np.array(gone))
        if "train" in self._splits and self._splits["train"].gone_D.all():
            raise UsageError(
                f"expected at least one train document to stay in {cache.path}, found that all "
                f"would be deleted. Remove the cache itself instead: rm -r {cache.path}"
            )

    def summary(self, *, dry_run: bool = False) -> DeleteSummary:
        """Return what is deleted."""
        splits = self._splits
        documents = {
            name
            for split in splits.values()
            for name, gone in zip(split.tables.names, split.gone_D, strict=True)
            if gone
        }
        return DeleteSummary(
            cache=str(self.cache.path),
            documents=tuple(sorted(documents)),
            sequences={name: int(split.gone_S.sum()) for name, split in splits.items()},
            tokens={name: split.tokens for name, split in splits.items()},
            blocks={name: len(split.blocks) for name, split in splits.items()},
            dry_run=dry_run,
        )

    def attributes(self) -> CacheAttributes:
        """Return the root attributes: deletions are counted, and sources name no deleted one."""
        attributes = self.cache.attributes
        corpus = json.loads(json.dumps(attributes.corpus))
        summary = self.summary()
        counts = {
            "documents": len(summary.documents),
            "sequences": sum(summary.sequences.values()),
            "tokens": sum(summary.tokens.values()),
        }
        earlier = corpus.get("deleted", {})
        corpus["deleted"] = {key: n + earlier.get(key, 0) for key, n in counts.items()}
        names = {*summary.documents, *self._names}
        for part in corpora_of(corpus):
            for key in ("sources", "dev_sources", "test_sources"):
                part["config"][key] = [
                    "(deleted)" if _is_one_of(source, names) else source
                    for source in part["config"].get(key) or ()
                ]
        return replace(attributes, corpus=corpus)

    def stage(self, staged: StagedCache, progress: Progress) -> None:
        """Stage the splits that lose documents."""
        total = sum(len(split.blocks) for split in self._splits.values())
        with progress.bar("rewriting", total, "blocks") as bar:
            for name, split in self._splits.items():
                tables = split.kept_tables()
                totals = self.cache.totals(name)
                totals["sequences"] = len(tables.rows_S2)
                totals["tokens"] -= split.tokens
                totals["targets"] -= self._targets(name, split)
                totals["documents"] = len(tables.names)
                staged.write_split(name, tables, totals, self._blocks(name, split, staged, bar))

    def _targets(self, name: str, split: _Split) -> int:
        """Return the number of targets in deleted sequences."""
        count = 0
        for block in split.blocks:
            _, mask_N = self.cache.tokens[name].used(block)
            for first, stop in split.rows(block, self.cache.settings.block_tokens):
                count += int(mask_N[first:stop].sum())
        return count

    def _blocks(
        self, name: str, split: _Split, staged: StagedCache, bar: Bar
    ) -> Iterator[EditedBlock]:
        """Stage the blocks that hold deleted sequences; yield all blocks in order."""
        newest = newest_generations(self.cache.path, name)
        rewritten = {*split.blocks}
        for block, (records, quarantined) in enumerate(self.cache.blocks(name)):
            renumbered = split.renumbered(quarantined)
            if block in rewritten:
                rows = split.rows(block, self.cache.settings.block_tokens)
                self._zero_tokens(name, block, rows, staged)
                records = tuple(
                    self._zero_shard(name, block, record, rows, staged) for record in records
                )
                bar.advance(1)
            changed = block in rewritten or renumbered != quarantined
            generation = newest.get(block, -1) + 1 if changed else None
            yield EditedBlock(records, renumbered, generation)

    def _zero_tokens(
        self, name: str, block: int, rows: list[list[int]], staged: StagedCache
    ) -> None:
        """Stage a block's ids, loss mask and spans with zeros in some rows."""
        cache = self.cache
        for array, (dtype, columns) in ROWS.items():
            path = chunk_name(name, array, block)
            values = read_chunk(
                cache.path / path,
                shape=(cache.settings.block_tokens, *columns),
                dtype=dtype,
                coder=CODERS["blosc"],
            )
            cache.token_files[name].check(array, block)
            _zero(values, rows)
            write_chunk(staged.folder / path, values, CODERS["blosc"])

    def _zero_shard(
        self, name: str, block: int, record: FileRecord, rows: list[list[int]], staged: StagedCache
    ) -> FileRecord:
        """Stage a shard with zeros in some rows; return its record."""
        settings = self.cache.settings
        spec = block_shards(name, block, settings)[record.path]
        size = chunk_rows(spec, settings.block_tokens)
        chunks = settings.block_tokens // size
        values = read_shard(
            self.cache.path / record.path,
            rows=settings.block_tokens,
            columns=spec.columns(self.cache.attributes.base["hidden_size"]),
            dtype=spec.dtype,
            chunk_rows=size,
            chunks=chunks,
            coder=CODERS[spec.coder],
            record=record,
        )
        _zero(values, rows)
        path = staged.folder / record.path
        length, digest = write_shard(path, values, size, CODERS[spec.coder])
        return FileRecord(
            path=record.path, bytes=length, sha256=digest, crc32c=chunks_crc32c(path, chunks)
        )


def _zero(values: Array, rows: list[list[int]]) -> None:
    for first, stop in rows:
        values[first:stop] = 0


def _is_one_of(source: str, names: set[str]) -> bool:
    """Return whether a source is itself one of the documents, by the end of its path."""
    return any(source == name or source.endswith(f"/{name}") for name in names)
