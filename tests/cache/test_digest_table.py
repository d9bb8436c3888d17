"""A digest table returns the records that were written; a damaged page is refused."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.cache.manifest import digest_table as digest_table_module
from embedcache.cache.manifest.digest_table import (
    PAGE,
    DigestTable,
    TableDigest,
    write_digest_table,
)
from embedcache.cache.manifest.file_record import FILE
from embedcache.errors import CacheError

SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7]


def records(count: int) -> list[tuple[int, int, bytes]]:
    draw = random.Random(count)
    return [(draw.getrandbits(60), draw.getrandbits(32), draw.randbytes(32)) for _ in range(count)]


def written(path: Path, count: int) -> tuple[TableDigest, DigestTable]:
    digest = write_digest_table(path, FILE, iter(records(count)))
    return digest, DigestTable(path, FILE, digest)


@pytest.mark.parametrize("count", SIZES)
def test_numpy_reads_what_is_written(tmp_path: Path, count: int) -> None:
    path = tmp_path / "folder" / "digest_table"
    digest, digest_table = written(path, count)
    assert [row.item() for row in digest_table] == records(count)
    assert [digest_table[row].item() for row in range(len(digest_table))] == records(count)
    assert digest_table.fault() is None
    assert path.is_file() == bool(count)
    assert [p.name for p in path.parent.iterdir()] == ["digest_table"] * bool(count)
    if not count:
        return
    data = path.read_bytes()
    assert len(data) == digest_table.size
    mapped: Any = np.memmap(path, FILE, mode="r", shape=(count,))
    assert [row.item() for row in mapped] == records(count)
    pages = [
        hashlib.sha256(mapped[start : start + PAGE].tobytes()).digest()
        for start in range(0, count, PAGE)
    ]
    assert data == mapped.tobytes() + b"".join(pages)
    assert digest == TableDigest(rows=count, sha256=hashlib.sha256(b"".join(pages)).hexdigest())


def test_an_index_out_of_range_is_refused(tmp_path: Path) -> None:
    _, digest_table = written(tmp_path / "digest_table", 5)
    for row in (-1, 5):
        with pytest.raises(IndexError):
            digest_table[row]


@pytest.mark.parametrize("place", [0, PAGE * 44 - 1, PAGE * 44, 3 * PAGE * 44 + 5, -1, -65, -128])
def test_a_changed_bit_affects_only_its_page(tmp_path: Path, place: int) -> None:
    path, count = tmp_path / "digest_table", 3 * PAGE + 7
    digest, _ = written(path, count)
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)
    digest_table = DigestTable(path, FILE, digest)
    of_hashes = place % len(data) >= count * 44
    damaged = set(range(4)) if of_hashes else {place // (PAGE * 44)}
    for row, record in enumerate(records(count)):
        if row // PAGE in damaged:
            with pytest.raises(CacheError, match=r"`embedcache\.repair\(\)`"):
                digest_table[row]
        else:
            assert digest_table[row].item() == record
    why = "other page hashes" if of_hashes else f"fails the SHA-256 of page {min(damaged)}"
    assert why in (digest_table.fault() or "")


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing", "another's"])
def test_another_file_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "digest_table"
    _, digest_table = written(path, PAGE + 3)
    data = path.read_bytes()
    match change:
        case "shorter":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"0")
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "another's":
            write_digest_table(path, FILE, records(PAGE + 4)[1:])
    assert digest_table.fault()
    if change != "longer":  # everything that is read matches
        with pytest.raises(CacheError, match=r"the cache is damaged"):
            digest_table[0]


def test_few_pages_are_kept_and_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, digest_table = written(tmp_path / "digest_table", 40 * PAGE)
    read: list[int] = []
    pread = digest_table_module.os.pread
    monkeypatch.setattr(
        digest_table_module.os,
        "pread",
        lambda fd, size, at: read.append(size) or pread(fd, size, at),
    )
    for row in [*range(PAGE), PAGE, 0, 1]:
        digest_table[row]
    assert sorted(read) == sorted([40 * 32, PAGE * 44, PAGE * 44])
    for row in range(0, 40 * PAGE, PAGE):
        digest_table[row]
    assert digest_table._page.cache_info().currsize == digest_table_module.KEPT_PAGES
