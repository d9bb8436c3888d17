"""Assign documents to train, dev and test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import cast

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup import DuplicateIndex
from embedcache.corpus.documents import SPLITS, CorpusSummary, Document, Split
from embedcache.errors import CorpusError, nearest

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio; its multiples modulo 2^64 are spread evenly."""


class SplitFile:
    """The splits of documents by name, from a file ``{"train": [names], …}``.

    Raises:
        CorpusError: the file is missing or malformed, or a name is in two splits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._split_of: dict[str, Split] = {}
        self._seen: set[str] = set()
        for split, names in _read_split_file(path).items():
            for name in names:
                if self._split_of.setdefault(name, split) != split:
                    raise CorpusError(
                        f"{path}: expected each name in one split, found {name!r} in "
                        f"{self._split_of[name]} and {split}."
                    )

    def split_of(self, document: Document) -> Split | None:
        """Return the split of a document, which the file lists by label or by name, or None."""
        for name in (document.label, document.name):
            if name in self._split_of:
                self._seen.add(name)
                return self._split_of[name]
        return None

    def check_complete(self) -> None:
        """Raise ``CorpusError`` if a listed document was not found."""
        missing = [name for name in self._split_of if name not in self._seen]
        if missing:
            some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise CorpusError(
                f"{self.path}: expected {len(self._split_of)} documents, did not find "
                f"{len(missing)} of them: {some}. A name is a path below the source folder, or "
                "file.jsonl:line."
            )


class SplitChooser:
    """Assigns documents to splits, and near-duplicates to the same split.

    Args:
        config: the fractions of dev and test, and the seed.
        index: the documents seen so far.
        summary: counts the groups of near-duplicates.
    """

    def __init__(self, config: CorpusConfig, index: DuplicateIndex, summary: CorpusSummary) -> None:
        self._index = index
        self._summary = summary
        self._dev, self._test = config.fractions
        seed = hashlib.blake2b(str(config.split_seed).encode(), digest_size=8).digest()
        self._start = int.from_bytes(seed, "little")
        self._groups = index.cached_groups
        self._first: list[Split] = ["train"]
        self._first += ["dev"] if self._dev else []
        self._first += ["test"] if self._test else []

    def choose(self, sketch: bytes, given: Split | None) -> Split:
        """Return the split of a document and add the document to the index.

        A near-duplicate of a cached document goes to the split of that document. Otherwise a
        document with a ``given`` split goes there, and a near-duplicate goes to the split of its
        oldest group. The first new groups go to train, dev and test, so that no split is empty.
        Further groups follow a low-discrepancy sequence that keeps to the fractions.

        Args:
            sketch: the document's MinHash sketch.
            given: the split of the document's source or of the split file, or None.
        """
        groups = self._index.find(sketch)
        oldest = groups[0] if groups else None
        if oldest is not None and (given is None or oldest.number <= self._index.cached_groups):
            split = oldest.split
            self._summary.elsewhere += given not in (None, split)
        else:
            split = self._next() if given is None else given
        if any(group.mixed or group.split != split for group in groups):
            self._summary.near_duplicates_across_splits += 1
        size = self._index.add(sketch, groups, split)
        self._summary.near_duplicate_groups += size == 2
        if size > 1:
            self._summary.largest_near_duplicate_group = max(
                self._summary.largest_near_duplicate_group, size
            )
        return split

    def _next(self) -> Split:
        number = self._groups
        self._groups += 1
        if number < len(self._first):
            return self._first[number]
        place = ((self._start + number * GOLDEN) % 2**64) / 2**64
        if place < self._dev:
            return "dev"
        return "test" if place < self._dev + self._test else "train"


def _read_split_file(path: Path) -> dict[Split, list[str]]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: expected a split file, found nothing there.") from error
    except (ValueError, OSError) as error:
        raise CorpusError(f"{path}: expected a split file in JSON, found: {error}.") from error
    if not isinstance(value, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in value.values()
    ):
        raise CorpusError(
            f'{path}: expected {{"train": [names], "dev": [names], "test": [names]}}, '
            "found another shape."
        )
    for key in value:
        if key not in SPLITS:
            raise CorpusError(
                f"{path}: expected the splits train, dev and test, found {key!r}."
                f"{nearest(key, SPLITS)}"
            )
    return cast(dict[Split, list[str]], value)
