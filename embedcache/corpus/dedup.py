"""Duplicates and near-duplicates: fingerprints of documents, and the index that finds them.

A fingerprint is a digest, equal for equal documents, and a MinHash sketch, from which the Jaccard
similarity of two documents is estimated. The sketch is one-permutation MinHash (Li, Owen and Zhang,
arXiv 1208.1259) with empty bins filled by rotation (Shrivastava and Li, arXiv 1406.4784), of which
one byte a bin is kept (Li and König, arXiv 0910.3349). A cache stores the fingerprints, so this
module must compute the same sketch in every version; it does not depend on a library for it.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedcache.corpus.documents import Document, Split
from embedcache.store.files import canonical_json

THRESHOLD = 0.7
"""Smallest estimated similarity of near-duplicates."""
SHINGLE_BYTES = 16
"""Similarity is that of the sets of substrings of this many bytes."""
SKETCHED_BYTES = 1 << 20
"""Only the start of a document is compared."""
BINS = 128
BAND_BYTES = 8
"""Documents that share no band of this many bins are not compared."""
DIGEST_BYTES = 16
FINGERPRINT_BYTES = DIGEST_BYTES + BINS
INDEX_CACHE_KIB = 65536

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_WEIGHTS = np.frombuffer(hashlib.shake_128(b"").digest(8 * (SHINGLE_BYTES + BINS)), "<u8")
_SHINGLE_WEIGHTS, _BIN_WEIGHTS = np.split(_WEIGHTS | np.uint64(1), [SHINGLE_BYTES])
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Fingerprint(NamedTuple):
    """A document's digest and sketch. Only the first part of a large file has a sketch."""

    digest: bytes
    sketch: bytes | None

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return the fingerprint as uint8 [FINGERPRINT_BYTES]; a missing sketch is zeros."""
        data = self.digest + (self.sketch or b"")
        return np.frombuffer(data.ljust(FINGERPRINT_BYTES, b"\0"), np.uint8)

    @classmethod
    def unpacked(cls, row: npt.NDArray[np.uint8]) -> Fingerprint:
        """Return the fingerprint from its `packed` form."""
        data = row.tobytes()
        sketch = data[DIGEST_BYTES:]
        return cls(data[:DIGEST_BYTES], sketch if any(sketch) else None)


def document_digest(document: Document, data: bytes) -> bytes:
    """Return a hash of a document's rendered text ``data`` and of which parts are targets.

    The hash does not depend on the document's name, its corpus or the context.
    """
    parts = [[len(segment.text), segment.target] for segment in document.segments]
    head = canonical_json([document.closed, parts])
    return hashlib.blake2b(head.encode() + b"\n" + data, digest_size=DIGEST_BYTES).digest()


def minhash(data: bytes) -> bytes:
    """Return the MinHash sketch of ``data``, one byte for each of the `BINS`."""
    if len(data) < SHINGLE_BYTES:
        data = hashlib.blake2b(data, digest_size=SHINGLE_BYTES).digest()
    values = np.frombuffer(data[:SKETCHED_BYTES], np.uint8).astype(np.uint64)
    hashes = np.convolve(values, _SHINGLE_WEIGHTS, "valid")
    hashes = (hashes ^ (hashes >> np.uint64(29))) * _MIX
    # The upper seven bits of a hash choose its bin, which keeps the least of the other bits.
    bins = np.full(BINS, _EMPTY)
    np.minimum.at(bins, (hashes >> np.uint64(57)).astype(np.intp), hashes << np.uint64(7))
    filled = np.flatnonzero(bins != _EMPTY)
    # An empty bin takes the value of the next one that is not empty.
    source = filled[np.searchsorted(filled, np.arange(BINS)) % len(filled)]
    # Each bin has its own weight, so that bins filled from one value have independent bytes.
    return (bins[source] * _BIN_WEIGHTS >> np.uint64(56)).astype(np.uint8).tobytes()


def similarity(sketch: bytes, other: bytes) -> float:
    """Return the estimated Jaccard similarity of two documents from their sketches."""
    return float(np.mean(np.frombuffer(sketch, np.uint8) == np.frombuffer(other, np.uint8)))


class CachedDocument(NamedTuple):
    """A document that a cache already has."""

    name: str
    split: Split
    fingerprint: Fingerprint


class Group(NamedTuple):
    """A group of near-duplicate documents."""

    number: int
    """1, 2, … in the order in which the groups began."""
    split: Split
    """The split of its first document."""
    mixed: bool
    """Whether another of its documents is in another split."""


class DuplicateIndex:
    """The names, digests and near-duplicate groups of the documents seen so far.

    The tables are in a private temporary SQLite file, so that memory does not grow with the corpus.

    Args:
        cached: documents of a cache, in the order in which they were added to it.
    """

    def __init__(self, cached: Iterable[CachedDocument] = ()) -> None:
        # SQLite deletes a database without a name when it is closed. A prefetch thread may read
        # the corpus.
        self._tables = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._tables.executescript(
            f"""
            PRAGMA journal_mode = OFF;
            PRAGMA synchronous = OFF;
            PRAGMA cache_size = -{INDEX_CACHE_KIB};
            CREATE TABLE bands (band INTEGER PRIMARY KEY, document INTEGER);
            CREATE TABLE documents (number INTEGER PRIMARY KEY, family INTEGER, sketch BLOB);
            CREATE TABLE families (
                number INTEGER PRIMARY KEY, split TEXT, mixed INTEGER, size INTEGER);
            CREATE TABLE names (hash INTEGER PRIMARY KEY);
            CREATE TABLE cached (digest BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID;
            BEGIN;
            """
        )
        for document in cached:
            self._add_cached(document)
        row = self._tables.execute("SELECT COUNT(*) FROM families").fetchone()
        self.cached_groups = int(row[0])
        """Number of groups of the cached documents; their numbers come first."""

    def _add_cached(self, document: CachedDocument) -> None:
        self._take(document.name)
        self._take(re.sub(r"#\d+$", "", document.name))  # the file of which it may be a part
        digest, sketch = document.fingerprint
        self._tables.execute("INSERT OR IGNORE INTO cached VALUES (?, ?)", (digest, document.split))
        if sketch is not None:
            self.add(sketch, self.find(sketch), document.split)

    def close(self) -> None:
        """Delete the tables."""
        self._tables.close()

    def unique_name(self, name: str) -> str:
        """Return ``name``, or ``name@2``, ``name@3``, … if the name is taken."""
        candidate, count = name, 1
        while not self._take(candidate):
            count += 1
            candidate = f"{name}@{count}"
        return candidate

    def cached_split(self, digest: bytes) -> Split | None:
        """Return the split in which the cache has exactly this document, or None."""
        row = self._tables.execute("SELECT split FROM cached WHERE digest = ?", (digest,))
        found = row.fetchone()
        return None if found is None else found[0]

    def find(self, sketch: bytes) -> list[Group]:
        """Return the groups that have a near-duplicate of a document, the oldest first."""
        bands = _bands(sketch)
        rows = self._tables.execute(
            f"SELECT DISTINCT f.number, f.split, f.mixed, d.sketch FROM bands b "
            f"JOIN documents d ON d.number = b.document JOIN families f ON f.number = d.family "
            f"WHERE b.band IN ({','.join('?' * len(bands))})",
            bands,
        )
        return sorted(
            {
                Group(number, split, bool(mixed))
                for number, split, mixed, other in rows
                if similarity(sketch, other) >= THRESHOLD
            }
        )

    def add(self, sketch: bytes, groups: list[Group], split: Split) -> int:
        """Add a document to the first of its groups, or to a new one if it has none.

        Returns:
            The size of the group.
        """
        group = groups[0].number if groups else None
        if group is None:
            group = self._tables.execute(
                "INSERT INTO families (split, mixed, size) VALUES (?, 0, 0)", (split,)
            ).lastrowid
        document = self._tables.execute(
            "INSERT INTO documents (family, sketch) VALUES (?, ?)", (group, sketch)
        ).lastrowid
        self._tables.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)",
            [(band, document) for band in _bands(sketch)],
        )
        self._tables.execute(
            "UPDATE families SET size = size + 1, mixed = mixed OR split != ? WHERE number = ?",
            (split, group),
        )
        row = self._tables.execute("SELECT size FROM families WHERE number = ?", (group,))
        return int(row.fetchone()[0])

    def _take(self, name: str) -> bool:
        """Record a name; return whether it was new."""
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        return self._tables.execute("INSERT OR IGNORE INTO names VALUES (?)", (key,)).rowcount == 1


def _bands(sketch: bytes) -> list[int]:
    return np.frombuffer(sketch, f"<i{BAND_BYTES}").tolist()
