"""The blocks of a cache that are committed, counted from their markers."""

from __future__ import annotations

from collections.abc import Iterable

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import NumericsError
from embedcache.extraction.sample import BlockId

GRACE = 8
"""Number of sequences that may be quarantined before their share is checked."""


class CommittedBlocks:
    """Counts committed blocks and quarantined sequences. Markers are not kept: they may be many."""

    def __init__(self, splits: dict[str, SplitTokens], attempt: str, max_quarantined: float):
        """Count nothing yet.

        Args:
            splits: the tokens of each split.
            attempt: the id of this run's attempt, whose blocks are counted as its own.
            max_quarantined: permitted share of quarantined sequences.
        """
        self._splits = splits
        self._attempt = attempt
        self._max_quarantined = max_quarantined
        self._sequences = 0
        self._quarantined = 0
        self.blocks: dict[str, set[int]] = {name: set() for name in SPLITS}
        """Numbers of the committed blocks by split."""
        self.own = 0
        """Number of blocks that this run committed."""

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))

    def add(self, marker: Marker) -> None:
        """Count the block of a marker."""
        first, stop = self._splits[marker.split].bounds(marker.block)
        self.blocks[marker.split].add(marker.block)
        self.own += marker.attempt == self._attempt
        self._sequences += stop - first
        self._quarantined += len(marker.quarantined)

    def add_all(self, markers: Iterable[Marker]) -> None:
        """Count the blocks of several markers."""
        for marker in markers:
            self.add(marker)

    def missing(self) -> list[BlockId]:
        """Return the blocks that are not committed, in the order in which they are computed."""
        return [
            (name, block)
            for name, split in self._splits.items()
            for block in range(split.blocks)
            if block not in self.blocks[name]
        ]

    def check_quarantined(self, *, finished: bool = False) -> None:
        """Raise ``NumericsError`` if too many sequences are quarantined."""
        grace = min(GRACE, self._sequences // 2) if finished else GRACE
        if self._quarantined > max(grace, self._max_quarantined * self._sequences):
            raise NumericsError(
                f"{self._quarantined} of the first {self._sequences} sequences gave embeddings "
                f"that are not finite, expected at most {self._max_quarantined:.2%}: the base "
                "overflows. Use `dtype=` 'float32' or 'bfloat16' and another `out=`, or allow more "
                "with `max_quarantined=`."
            )
