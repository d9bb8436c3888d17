"""Near-duplicates: documents that share most of their 16-byte stretches.

One-permutation MinHash (Li, Owen and Zhang, arXiv 1208.1259; empty bins filled by rotation,
Shrivastava and Li, arXiv 1406.4784) and locality-sensitive hashing in bands. The tables live in a
private SQLite file that vanishes when closed, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SHINGLE_BYTES = 16
JUDGED_BYTES = 1 << 20
"""Only the start of a document is judged."""
BINS = 128
BANDS = 16
THRESHOLD = 0.7
"""Least estimated Jaccard similarity of near-duplicates."""
BLOCK = 1 << 16
CACHE_KIB = 65536
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
ODD = np.uint64(0x9E3779B97F4A7C15)


def signature(data: bytes) -> npt.NDArray[np.uint64]:
    """Return the MinHash signature of ``data``, [BINS]; equal for equal data.

    The part of equal bins estimates the Jaccard similarity of the sets of 16-byte stretches.
    Shorter data is only similar to its equal.
    """
    bins = np.full(BINS, EMPTY, np.uint64)
    if len(data) < SHINGLE_BYTES:
        digest = hashlib.blake2b(data, digest_size=8).digest()
        _lower(bins, np.array([int.from_bytes(digest, "little")], np.uint64))
    else:
        values = np.frombuffer(data[:JUDGED_BYTES], np.uint8)
        for start in range(0, len(values) - SHINGLE_BYTES + 1, BLOCK):
            _lower(bins, _shingles(values[start : start + BLOCK + SHINGLE_BYTES - 1]))
    filled = np.flatnonzero(bins != EMPTY)
    # An empty bin takes the value of the next one that is filled, around the end.
    source = filled[np.searchsorted(filled, np.arange(BINS)) % len(filled)]
    return bins[source]


@dataclass(frozen=True, slots=True)
class Match:
    """A group of documents that a new one is like."""

    group: int
    split: str
    """Where its first document went."""
    mixed: bool
    """Another of its documents was put elsewhere."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What was found of a document, and what storing it needs."""

    matches: tuple[Match, ...]
    keys: tuple[int, ...]
    low: bytes


class DuplicateIndex:
    """The documents seen so far, their groups and where those went."""

    def __init__(self) -> None:
        # An empty name is a private file on disk; a prefetching thread may read the corpus.
        self._tables = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._tables.executescript(
            f"""
            PRAGMA journal_mode = OFF;
            PRAGMA synchronous = OFF;
            PRAGMA cache_size = -{CACHE_KIB};
            CREATE TABLE bands (key INTEGER PRIMARY KEY, document INTEGER);
            CREATE TABLE documents (
                id INTEGER PRIMARY KEY, family INTEGER, signature BLOB);
            CREATE TABLE families (
                id INTEGER PRIMARY KEY, split TEXT, mixed INTEGER, size INTEGER);
            CREATE TABLE names (key INTEGER PRIMARY KEY);
            BEGIN;
            """
        )

    def close(self) -> None:
        """Drop the tables."""
        self._tables.close()

    def unique_name(self, name: str) -> str:
        """Return ``name``, or ``name@2``, ``name@3``, … where it was taken before."""
        candidate, count = name, 1
        while not self._take(candidate):
            count += 1
            candidate = f"{name}@{count}"
        return candidate

    def find(self, data: bytes) -> Lookup:
        """Return the groups whose documents are nearly ``data``, the oldest first."""
        bins = signature(data)
        keys = _band_keys(bins)
        low = bins.astype(np.uint8)
        marks = ",".join("?" * len(keys))
        rows = self._tables.execute(
            f"SELECT DISTINCT f.id, f.split, f.mixed, d.signature FROM bands b "
            f"JOIN documents d ON d.id = b.document JOIN families f ON f.id = d.family "
            f"WHERE b.key IN ({marks})",
            keys,
        )
        matches = {
            Match(group, split, bool(mixed))
            for group, split, mixed, other in rows
            if np.mean(low == np.frombuffer(other, np.uint8)) >= THRESHOLD
        }
        ordered = tuple(sorted(matches, key=lambda match: match.group))
        return Lookup(ordered, keys, low.tobytes())

    def store(self, lookup: Lookup, split: str) -> int:
        """Add a document to its oldest group, or to a new one, and return the group's size."""
        group = lookup.matches[0].group if lookup.matches else None
        if group is None:
            group = self._tables.execute(
                "INSERT INTO families (split, mixed, size) VALUES (?, 0, 0)", (split,)
            ).lastrowid
        document = self._tables.execute(
            "INSERT INTO documents (family, signature) VALUES (?, ?)", (group, lookup.low)
        ).lastrowid
        self._tables.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, document) for key in lookup.keys]
        )
        self._tables.execute(
            "UPDATE families SET size = size + 1, mixed = mixed OR split != ? WHERE id = ?",
            (split, group),
        )
        row = self._tables.execute("SELECT size FROM families WHERE id = ?", (group,)).fetchone()
        return int(row[0])

    def _take(self, name: str) -> bool:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        return self._tables.execute("INSERT OR IGNORE INTO names VALUES (?)", (key,)).rowcount == 1


def _shingles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    words = values.astype(np.uint64)
    for width in (1, 2, 4):  # words of 2, 4 and 8 bytes, starting at every byte
        words = words[:-width] | (words[width:] << np.uint64(8 * width))
    return _mix(_mix(words[:-8]) + words[8:] * ODD)


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _lower(bins: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> None:
    # The top seven bits choose the bin, the others compete in it.
    np.minimum.at(bins, (hashes >> np.uint64(57)).astype(np.intp), hashes & (EMPTY >> np.uint64(7)))


def _band_keys(bins: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    rows = bins.reshape(BANDS, BINS // BANDS)
    keys = np.arange(BANDS, dtype=np.uint64)
    for column in range(rows.shape[1]):
        keys = _mix(keys * ODD + rows[:, column])
    return tuple(keys.astype(np.int64).tolist())
