"""The batches that some members of a stack see in step."""

from __future__ import annotations

from collections.abc import Iterator

from embedcache.cache.loader import Batch, BatchLoader
from embedcache.training.member import Member


class Feed:
    """One order of batches, and the members that are at the same place in it.

    ``batch`` is the one that is due, None before `advance` and after the step that used it.
    """

    def __init__(self, loader: BatchLoader, members: list[Member]):
        self.members = members
        self.batch: Batch | None = None
        self._loader = loader
        self._epoch: Iterator[Batch] | None = None

    def advance(self) -> bool:
        """Have a batch due; False at the end of an epoch, once, after which the next one begins."""
        if self.batch is None:
            if self._epoch is None:
                state = self.members[0].state
                self._epoch = self._loader.epoch(state.epoch, skip=state.position)
            self.batch = next(self._epoch, None)
            if self.batch is None:
                self._epoch = None
        return self.batch is not None
