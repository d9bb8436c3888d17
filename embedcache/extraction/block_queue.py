"""Which blocks of a cache are committed, and which ones this process is to compute."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.format.layout import SPLITS, marker_path
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import NumericsError
from embedcache.extraction.sample import BlockId
from embedcache.store import lease as timing
from embedcache.store.lease import Leases, lease_name

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


class BlockQueue:
    """Iterates over blocks that are not committed yet.

    Yields a block that this process has leased and is to compute, the marker of a block that
    another process has committed, or None while other processes hold every remaining block. Blocks
    are leased only when the next item is requested, so that work spreads evenly.
    """

    def __init__(self, cache: Path, leases: Leases, blocks: list[BlockId]):
        self._cache = cache
        self._leases = leases
        self._blocks = blocks

    def __iter__(self) -> Iterator[BlockId | Marker | None]:
        left = self._blocks
        while left:
            leased_by_others = []
            for block in left:
                found = self._marker(block)
                if found is None and not self._leases.take(lease_name(*block)):
                    leased_by_others.append(block)
                elif found is None and (found := self._marker(block)) is None:
                    yield block
                else:
                    self.done(block)
                    yield found
            left = leased_by_others
            if left:
                yield None
                time.sleep(timing.POLL_SECONDS)

    def done(self, block: BlockId) -> None:
        """Release the lease on a committed block."""
        self._leases.release(lease_name(*block))

    def _marker(self, block: BlockId) -> Marker | None:
        path = marker_path(self._cache, *block)
        return Marker.read(path) if path.is_file() else None
