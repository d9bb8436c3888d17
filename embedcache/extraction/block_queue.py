"""The blocks to compute, shared among the processes that extract into one cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.format.layout import marker_path
from embedcache.extraction.sample import BlockId
from embedcache.store import lease as timing
from embedcache.store.lease import Leases, lease_name


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
