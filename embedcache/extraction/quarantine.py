"""Sequences put aside because their embeddings are not finite, and when they are too many."""

from __future__ import annotations

from embedcache.cache.blocks.commit import Marker
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import NumericsError

GRACE = 8
"""Sequences that may be put aside before their share is looked at."""


class Quarantine:
    """Counts over the committed blocks of a run."""

    def __init__(self, splits: dict[str, SplitTokens], largest_share: float):
        self._splits = splits
        self._largest_share = largest_share
        self._seen = 0
        self._put_aside = 0

    def count(self, name: str, marker: Marker) -> None:
        """Take note of a committed block."""
        first, stop = self._splits[name].bounds(marker.block)
        self._seen += stop - first
        self._put_aside += len(marker.quarantined)

    def check(self, *, finished: bool = False) -> None:
        """Raise ``NumericsError`` where too many sequences are put aside."""
        grace = min(GRACE, self._seen // 2) if finished else GRACE
        if self._put_aside > max(grace, self._largest_share * self._seen):
            raise NumericsError(
                f"{self._put_aside} of the first {self._seen} sequences gave embeddings that "
                f"are not finite, expected at most {self._largest_share:.2%}: the base "
                "overflows. Try --dtype float32 or bfloat16 and another --out, or allow more with "
                "--max-quarantined."
            )
