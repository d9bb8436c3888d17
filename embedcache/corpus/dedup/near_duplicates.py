"""Near-duplicates: documents that share most of their 16-byte stretches.

The tables live in a private SQLite file that vanishes when closed, so memory does not grow with the
corpus.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from embedcache.corpus.dedup.fingerprint import Fingerprint, Sketch
from embedcache.corpus.summary import Split

THRESHOLD = 0.7
"""Least estimated Jaccard similarity of near-duplicates."""
CACHE_KIB = 65536


@dataclass(frozen=True, slots=True)
class Held:
    """A document that a cache holds already."""

    name: str
    split: Split
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Match:
    """A group of documents that a new one is like."""

    group: int
    split: Split
    """Where its first document went."""
    mixed: bool
    """Another of its documents was put elsewhere."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What was found of a document, and what storing it needs."""

    matches: tuple[Match, ...]
    sketch: Sketch


class DuplicateIndex:
    """The documents seen so far, their groups and where those went."""

    def __init__(self, held: Iterable[Held] = ()) -> None:
        """Begin with the documents that are ``held``, in the order in which they came."""
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
            CREATE TABLE held (digest BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID;
            BEGIN;
            """
        )
        for document in held:
            self._hold(document)
        row = self._tables.execute("SELECT COUNT(*) FROM families").fetchone()
        self.held_groups = int(row[0])
        """How many groups there were of held documents: the first so many."""

    def _hold(self, document: Held) -> None:
        self._take(document.name)
        self._take(re.sub(r"#\d+$", "", document.name))  # of the file that it is a piece of
        found = document.fingerprint
        self._tables.execute(
            "INSERT OR IGNORE INTO held VALUES (?, ?)", (found.digest, document.split)
        )
        if found.sketch is not None:
            self.store(self.find(found.sketch), document.split)

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

    def held_in(self, digest: bytes) -> Split | None:
        """Return the split in which this very document is held, if it is."""
        row = self._tables.execute("SELECT split FROM held WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else row[0]

    def find(self, sketch: Sketch) -> Lookup:
        """Return the groups whose documents are nearly the one sketched, the oldest first."""
        marks = ",".join("?" * len(sketch.keys))
        rows = self._tables.execute(
            f"SELECT DISTINCT f.id, f.split, f.mixed, d.signature FROM bands b "
            f"JOIN documents d ON d.id = b.document JOIN families f ON f.id = d.family "
            f"WHERE b.key IN ({marks})",
            sketch.keys,
        )
        matches = {
            Match(group, split, bool(mixed))
            for group, split, mixed, low in rows
            if sketch.similarity(low) >= THRESHOLD
        }
        return Lookup(tuple(sorted(matches, key=lambda match: match.group)), sketch)

    def store(self, lookup: Lookup, split: str) -> int:
        """Add a document to its oldest group, or to a new one, and return the group's size."""
        group = lookup.matches[0].group if lookup.matches else None
        if group is None:
            group = self._tables.execute(
                "INSERT INTO families (split, mixed, size) VALUES (?, 0, 0)", (split,)
            ).lastrowid
        document = self._tables.execute(
            "INSERT INTO documents (family, signature) VALUES (?, ?)", (group, lookup.sketch.low)
        ).lastrowid
        self._tables.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)",
            [(key, document) for key in lookup.sketch.keys],
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
