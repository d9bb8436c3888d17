"""Which blocks of a cache are committed, counted as their markers pass by.

No marker is kept: there may be a million, and each names several files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from embedcache.cache.blocks.commit import Marker, newest_generations
from embedcache.cache.blocks.files import BlockRecord
from embedcache.cache.format.layout import SPLITS, marker_path
from embedcache.extraction.quarantine import Quarantine


@dataclass(slots=True)
class Committed:
    """The committed blocks of each split, and how many of them ``attempt`` made."""

    quarantine: Quarantine
    attempt: str
    done: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in SPLITS})
    own: int = 0

    def count(self, markers: Iterable[Marker]) -> Committed:
        """Take note of the markers; return this."""
        for marker in markers:
            self.done[marker.split].add(marker.block)
            self.own += marker.attempt == self.attempt
            self.quarantine.count(marker.split, marker)
        return self

    @property
    def blocks(self) -> int:
        """Number of blocks, of all splits."""
        return sum(map(len, self.done.values()))


def recorded(cache: Path, split: str, blocks: int) -> Iterator[BlockRecord]:
    """Yield what the digest tables will hold of each block of a split, by its newest marker."""
    newest = newest_generations(cache, split)
    for block in range(blocks):
        marker = Marker.read(marker_path(cache, split, block, newest[block]))
        yield marker.files, marker.quarantined
