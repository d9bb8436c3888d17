"""Which split a document belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import cast

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup.fingerprint import Sketch
from embedcache.corpus.dedup.near_duplicates import DuplicateIndex
from embedcache.corpus.documents import Document
from embedcache.corpus.summary import SPLITS, CorpusSummary, Split
from embedcache.errors import CorpusError, nearest

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: its multiples spread most evenly over 64 bits."""


class SplitList:
    """The names of a split file."""

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
        """Return the split of a document, listed by its label or by its file; none if unlisted."""
        for name in (document.label, document.name):
            if name in self._split_of:
                self._seen.add(name)
                return self._split_of[name]
        return None

    def check_complete(self) -> None:
        """Raise ``CorpusError`` naming documents that are listed and were not found."""
        missing = [name for name in self._split_of if name not in self._seen]
        if missing:
            some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise CorpusError(
                f"{self.path}: expected {len(self._split_of)} documents, did not find "
                f"{len(missing)} of them: {some}. Names are paths below the folder named as "
                "source, or file.jsonl:line."
            )


class SplitChooser:
    """Assigns documents to splits, near-duplicates to the same one."""

    def __init__(self, config: CorpusConfig, index: DuplicateIndex, summary: CorpusSummary) -> None:
        self._index = index
        self._summary = summary
        self._dev, self._test = config.fractions
        seed = hashlib.blake2b(str(config.split_seed).encode(), digest_size=8).digest()
        self._start = int.from_bytes(seed, "little")
        self._groups = index.held_groups
        self._first: list[Split] = ["train"]
        self._first += ["dev"] if self._dev else []
        self._first += ["test"] if self._test else []

    def choose(self, sketch: Sketch, given: Split | None) -> Split:
        """Return the split of a document that is judged by its sketch; ``given`` where it is fixed.

        But a near-duplicate of a document that was held before goes where that is, whatever is
        given. Otherwise a near-duplicate goes where its oldest group went, and the first new groups
        to train, dev and test, so that none is empty; the others by a sequence that keeps to the
        fractions all along. Counts groups, and near-duplicates in unlike splits.
        """
        lookup = self._index.find(sketch)
        oldest = lookup.matches[0] if lookup.matches else None
        if oldest is not None and (given is None or oldest.group <= self._index.held_groups):
            split = oldest.split
            self._summary.elsewhere += given not in (None, split)
        else:
            split = self._next() if given is None else given
        if any(match.mixed or match.split != split for match in lookup.matches):
            self._summary.near_duplicates_across_splits += 1
        size = self._index.store(lookup, split)
        if size == 2:
            self._summary.near_duplicate_groups += 1
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
