"""A cache whose tables list many blocks, a few of which exist.

Each existing block is a hard link to a block of a small cache, so that its content is known. The
tables and digest tables are written by numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from support.digest_tables import files_of

from embedcache.cache.cache import read_attributes
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.format.layout import ROWS, TABLE_CHUNK, TABLES, block_shards, token_chunks
from embedcache.cache.manifest.digest_table import PAGE, TableDigest
from embedcache.cache.manifest.digests import publish_digests
from embedcache.cache.manifest.file_record import FILE, packed, record_file
from embedcache.cache.manifest.manifest import publish_manifest, read_manifest
from embedcache.cache.shards.shard import write_chunk
from embedcache.cache.tokens.files import chunk_name, tokens_digest_table
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.tables import SplitTables

Array = np.ndarray[Any, Any]
SPLIT = "train"
LONG = ("tokens/blocks", "tokens/offsets", "tokens/document")


def lengthened(small: Path, path: Path, blocks: int, real: list[int]) -> Path:
    """Make a cache of ``blocks`` train blocks at ``path`` that repeat the blocks of ``small``.

    Only the blocks ``real``, and the chunks of tables that describe them, have files.
    """
    shutil.copytree(small, path, copy_function=os.link)
    settings, manifest = read_attributes(small).settings, read_manifest(small)
    like = _Like(small, settings.block_tokens, blocks)
    lengths = dict.fromkeys(ROWS, blocks * settings.block_tokens)
    lengths |= {"tokens/blocks": blocks + 1}
    lengths |= dict.fromkeys(LONG[1:], like.sequences)
    parts = []
    for name in ROWS:
        files = [chunk_name(SPLIT, name, number) for number in range(like.period)]
        parts.append(np.resize(_records(small, files), blocks))
    for name, (dtype, columns) in TABLES.items():
        if name not in LONG:
            count = len([*small.glob(f"{SPLIT}/{name}/c/*")])
            files = [chunk_name(SPLIT, name, number) for number in range(count)]
            parts.append(_records(small, files))
            continue
        shutil.rmtree(path / SPLIT / name / "c")
        records = np.zeros(-(-lengths[name] // TABLE_CHUNK), FILE)
        for number in like.needed(name, real):
            values = np.zeros((TABLE_CHUNK, *columns), dtype)
            rows = np.arange(TABLE_CHUNK * number, min(TABLE_CHUNK * (number + 1), lengths[name]))
            values[: len(rows)] = like.table(name, rows)
            file = chunk_name(SPLIT, name, number)
            write_chunk(path / file, values, CODERS["blosc"])
            records[number] = packed(record_file(path / file, file))
        parts.append(records)
    sealed = _write(path / tokens_digest_table(SPLIT), np.concatenate(parts))
    shards = np.array([packed(r) for files in files_of(small, SPLIT) for r in files], FILE)
    shards = np.resize(shards, blocks * len(block_shards(SPLIT, 0, settings)))
    embeddings = _write(path / "digests" / SPLIT / "embeddings", shards)
    for block in real:
        old, new = (
            (*token_chunks(SPLIT, number), *block_shards(SPLIT, number, settings))
            for number in (block % like.period, block)
        )
        for source, target in zip(old, new, strict=True):
            if not (path / target).exists():
                (path / target).parent.mkdir(parents=True, exist_ok=True)
                os.link(small / source, path / target)
    seal = replace(
        manifest.tokens,
        metadata=_lengthen(path, manifest.tokens.metadata, lengths, settings.block_tokens * blocks),
        digest_tables=manifest.tokens.digest_tables | {tokens_digest_table(SPLIT): sealed},
    )
    train = replace(
        manifest.splits[SPLIT],
        blocks=blocks,
        sequences=like.sequences,
        tokens=like.tokens,
        embeddings=embeddings,
    )
    publish_digests(path, seal)
    splits = manifest.splits | {SPLIT: train}
    publish_manifest(path, replace(manifest, tokens=seal, splits=splits))
    return path


class _Like:
    """The tables of the long cache, computed from those of the small one."""

    def __init__(self, small: Path, block_tokens: int, blocks: int):
        self._tables = SplitTables.read(SplitTokens(small, SPLIT, block_tokens))
        self._block_tokens = block_tokens
        self.period = len(self._tables.block_starts) - 1
        self._block_starts = np.zeros(blocks + 1, np.int64)
        np.cumsum(np.resize(np.diff(self._tables.block_starts), blocks), out=self._block_starts[1:])
        self.sequences = int(self._block_starts[-1])
        lengths = self._tables.rows_S2 @ np.array([-1, 1])
        self.tokens = int(lengths.sum()) * blocks // self.period

    def table(self, name: str, rows: Array) -> Array:
        """Return rows of a table."""
        if name == "tokens/blocks":
            return self._block_starts[rows]
        block_S = np.searchsorted(self._block_starts, rows, side="right") - 1
        as_S = self._tables.block_starts[block_S % self.period] + rows - self._block_starts[block_S]
        if name == "tokens/document":
            return self._tables.document_S[as_S]
        shift_S = (block_S - block_S % self.period) * self._block_tokens
        return self._tables.rows_S2[as_S] + shift_S[:, None]

    def needed(self, name: str, blocks: list[int]) -> set[int]:
        """Return the chunks of a table that describe some blocks."""
        spans = [(b, b + 2) for b in blocks]
        if name != "tokens/blocks":
            spans = [(int(self._block_starts[b]), int(self._block_starts[b + 1])) for b in blocks]
        return {n for a, b in spans for n in range(a // TABLE_CHUNK, -(-b // TABLE_CHUNK))}


def _records(root: Path, files: list[str]) -> Array:
    return np.array([packed(record_file(root / name, name)) for name in files], FILE)


def _write(path: Path, rows: Array) -> TableDigest:
    data, size = rows.tobytes(), PAGE * rows.itemsize
    hashes = b"".join(
        hashlib.sha256(data[at : at + size]).digest() for at in range(0, len(data), size)
    )
    path.unlink()  # a link to the small cache's file
    path.write_bytes(data + hashes)
    return TableDigest(rows=len(rows), sha256=hashlib.sha256(hashes).hexdigest())


def _lengthen(
    path: Path, metadata: dict[str, str], lengths: dict[str, int], rows: int
) -> dict[str, str]:
    """Write the new lengths into the metadata of train; return every ``zarr.json``."""
    found = dict(metadata)
    for name, text in metadata.items():
        array = name.removeprefix(f"{SPLIT}/").removesuffix("/zarr.json")
        if not name.startswith(f"{SPLIT}/") or '"node_type": "array"' not in text:
            continue
        if array in lengths or array.startswith(("embeddings/", "scale/")):
            value = json.loads(text)
            value["shape"][0] = lengths.get(array, rows)
            found[name] = json.dumps(value)
            (path / name).unlink()
            (path / name).write_text(found[name])
    return found
