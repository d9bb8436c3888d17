"""A digest table: a file of fixed-width records, hashed page by page.

The file holds the records one after the other, as numpy stores them, then the SHA-256 of each page
of `PAGE` records. Its `TableDigest`, which is kept elsewhere, holds the number of records and the
SHA-256 of the page hashes. So a table of any size is opened at once, and each page is checked when
it is used. A table without records has no file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.shards.errors import changed_error
from embedcache.errors import CacheError
from embedcache.store.files import fsync_path, make_folder

Array = np.ndarray[Any, Any]

PAGE = 256
"""Records that are hashed, read and checked together."""
KEPT_PAGES = 8
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDigest:
    """The digest of a digest table: its number of records and the SHA-256 of its page hashes."""

    rows: int
    sha256: str


class DigestTable:
    """Reads one digest table, indexed by record; a damaged page is never used."""

    def __init__(self, path: Path, dtype: np.dtype[Any], digest: TableDigest):
        self._path = path
        self._dtype = dtype
        self._digest = digest
        self._page = lru_cache(KEPT_PAGES)(self._read_page)

    def __len__(self) -> int:
        return self._digest.rows

    def __getitem__(self, row: int) -> Any:
        """Return a record; raises ``CacheError`` where its page is damaged or the file is gone."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._page(row // PAGE)[row % PAGE]

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._read_page(n) for n in range(self._pages))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return digest_table_bytes(len(self), self._dtype)

    def fault(self) -> str | None:
        """Read the whole file; return what is wrong with it, or None."""
        if not len(self):
            return None
        try:
            if not self._path.is_file():
                return "is missing"
            if (found := self._path.stat().st_size) != self.size:
                return f"has {found} bytes, expected {self.size}"
            for number in range(self._pages):
                self._read_page(number)
        except CacheError as error:
            return str(error).removeprefix(f"{self._path} ").partition(":")[0]
        except OSError as error:  # a disk that is failing
            return f"cannot be read ({error.strerror})"
        return None

    @property
    def _pages(self) -> int:
        return -(-len(self) // PAGE)

    @cached_property
    def _hashes(self) -> bytes:
        hashes = self._read(len(self) * self._dtype.itemsize, self._pages * _DIGEST)
        if hashlib.sha256(hashes).hexdigest() != self._digest.sha256:
            raise changed_error(self._path, "holds other page hashes than were written there")
        return hashes

    def _read_page(self, number: int) -> Array:
        rows = min(PAGE, len(self) - number * PAGE)
        size = self._dtype.itemsize
        data = self._read(number * PAGE * size, rows * size)
        if hashlib.sha256(data).digest() != self._hashes[number * _DIGEST :][:_DIGEST]:
            raise changed_error(self._path, f"fails the SHA-256 of page {number}")
        return np.frombuffer(data, self._dtype)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            with self._path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        except FileNotFoundError as error:
            raise changed_error(self._path, "is missing") from error


def digest_table_bytes(rows: int, dtype: np.dtype[Any]) -> int:
    """Return the size of a digest table's file."""
    return rows * dtype.itemsize + -(-rows // PAGE) * _DIGEST


def write_digest_table(path: Path, dtype: np.dtype[Any], records: Iterable[Any]) -> TableDigest:
    """Publish records as the digest table at ``path``; memory holds one page of them."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    hashes, rows, left = bytearray(), 0, iter(records)
    try:
        with partial.open("wb") as file:
            while page := list(itertools.islice(left, PAGE)):
                data = np.array(page, dtype).tobytes()
                hashes += hashlib.sha256(data).digest()
                rows += len(page)
                file.write(data)
            file.write(hashes)
        fsync_path(partial)
        if rows:
            partial.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(path.parent)
    return TableDigest(rows=rows, sha256=hashlib.sha256(hashes).hexdigest())
