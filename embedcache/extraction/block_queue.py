"""Blocks dealt out among the processes that extract into one cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.format.layout import marker_path
from embedcache.extraction.sample import Item
from embedcache.store import lease as timing
from embedcache.store.lease import Leases, lease_name


class Deal:
    """Says of each of the blocks ``todo`` whether it is for this process to compute.

    Iterating gives a block to compute, claimed; or the marker of one that another process has
    committed; or None, again and again, while all that is left is claimed by others. It ends when
    nothing is left, and runs no further ahead than it is asked, so that work input_stats evenly.
    """

    def __init__(
        self,
        cache: Path,
        leases: Leases,
        todo: list[Item],
        generations: dict[str, dict[int, int]],
    ):
        self._cache = cache
        self._leases = leases
        self._todo = todo
        self._generations = generations

    def generation(self, item: Item) -> int:
        """Return which generation of a block's marker is to be made."""
        name, block = item
        return self._generations[name].get(block, 0)

    def __iter__(self) -> Iterator[Item | Marker | None]:
        left = self._todo
        while left:
            others = []
            for item in left:
                found = self._marker(item)
                if found is None and not self._leases.take(lease_name(*item)):
                    others.append(item)
                elif found is None and (found := self._marker(item)) is None:
                    yield item
                else:
                    self.done(item)
                    yield found
            left = others
            if left:
                yield None
                time.sleep(timing.POLL_SECONDS)

    def done(self, item: Item) -> None:
        """Give up the lease on a block that is committed."""
        self._leases.release(lease_name(*item))

    def _marker(self, item: Item) -> Marker | None:
        path = marker_path(self._cache, *item, self.generation(item))
        return Marker.read(path) if path.is_file() else None
