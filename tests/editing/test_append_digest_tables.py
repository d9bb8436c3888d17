"""What an append tells of blocks: records of those that were there are taken over as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.digest_tables import files_of, put_aside, quarantined
from support.fixtures_append import added, every_byte, extracted
from support.fixtures_extract import flip_byte

import embedcache.editing.append as verb
from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import block_shards
from embedcache.cache.manifest import digest_table as digest_table
from embedcache.cache.manifest.file_record import FILE
from embedcache.cache.verify import verify
from embedcache.errors import CacheError
from embedcache.extraction.extract import extract


def rows_of(cache: Path, name: str, count: int) -> list[tuple[int, int, bytes]]:
    """Return a digest table's records as its file has them, without what reads it."""
    return np.frombuffer((cache / "digests" / name).read_bytes(), FILE, count).tolist()


def test_new_records_follow_those_that_were_there_over_pages(
    tiny_base: Path, corpus: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_table, "PAGE", 3)
    old = extracted(tmp_path / "cache", tiny_base, corpus)
    before, settings = Cache(old).manifest.splits["train"], Cache(old).attributes.settings
    was = rows_of(old, "train/embeddings", before.embeddings.rows)
    added(old, more)
    after = Cache(old).manifest.splits["train"]
    assert after.blocks > before.blocks
    rows = rows_of(old, "train/embeddings", after.embeddings.rows)
    assert rows[: len(was)] == was
    assert len(rows) > len(was) > 3
    names = [n for b in range(after.blocks) for n in block_shards("train", b, settings)]
    for (size, _, digest), name in zip(rows, names, strict=True):
        data = (old / name).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).digest())
    assert verify(old, deep=True).faults == ()


def set_aside(cache: Path, block: int, sequence: int) -> None:
    """Quarantine a train sequence of a finished cache, marker and all."""
    writer = BlockWriter(cache)
    files = files_of(cache, "train")[block]
    writer.renew("train", block, files, quarantined=(sequence,), generation=1)
    writer.close()
    put_aside(cache, "train", block, (sequence,))


def test_what_was_put_aside_stays_aside_on_both_sides(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Cache(old).manifest.splits["train"]
    last = before.sequences - 1
    set_aside(old, before.blocks - 1, last)

    def putting_aside(*arguments: Any, **named: Any) -> Any:
        done = extract(*arguments, **named)
        set_aside(named["out"], 0, 1)
        return done

    monkeypatch.setattr(verb, "extract", putting_aside)
    added(old, more)
    assert quarantined(old, "train") == (last, before.sequences + 1)
    assert verify(old, deep=True).faults == ()


@pytest.mark.parametrize("name", ["sealed", "embeddings"])
def test_a_damaged_ledger_is_not_added_to(old: Path, more: Path, name: str) -> None:
    before = every_byte(old)
    path = f"digests/train/{name}"
    flip_byte(old / path)
    with pytest.raises(CacheError, match=rf"{path} .*the cache is damaged.*--repair"):
        added(old, more)
    after = {key: data for key, data in every_byte(old).items() if not key.startswith(".staging/")}
    assert [key for key in before if after[key] != before[key]] == [path]
    assert after.keys() == before.keys()
    flip_byte(old / path)
    assert sum(added(old, more).documents.values()) == 9
    assert verify(old, deep=True).faults == ()
