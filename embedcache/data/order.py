"""Which sequences make which batch, and which batches are whose.

Blocks are shuffled, then the sequences inside a window of blocks; batches are filled to a token
budget, and dealt out to the ranks in turn. All of it is a pure function of (seed, epoch, position),
of which a window is worked out when it is needed.

Axes: S sequences of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from embedcache.cache.split_reader import SplitReader
from embedcache.data.packing import cut_parts
from embedcache.data.subset import Subset
from embedcache.errors import UsageError

Array = np.ndarray[Any, Any]

WINDOW = 8
"""Blocks whose sequences are shuffled together."""
AHEAD = 64
"""Items that a batch passes over, at most, for such behind them that still fit: of long sequences,
batches would be a tenth and more empty otherwise."""


class BatchOrder:
    """The batches of one rank, as arrays of items: block, place in the block, length."""

    def __init__(
        self,
        split: SplitReader,
        *,
        batch_tokens: int,
        seed: int,
        shuffle: bool,
        subset: Subset | None,
        rank: int,
        ranks: int,
    ):
        if not 0 <= rank < ranks:
            raise UsageError(
                f"expected a rank from 0 to {ranks - 1}, one of {ranks}, found {rank}. Type for "
                "example: BatchLoader(…, rank=0, ranks=2)"
            )
        self._split = split
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._shuffle = shuffle
        self._subset = subset
        self._rank = rank
        self._ranks = ranks

    def windows(self, epochs: range, skip: int) -> Iterator[list[Array | None]]:
        """Yield this rank's batches of each window that has some; None is where an epoch ends.

        From the first epoch's batch ``skip`` on, which counts the batches of all ranks; of those
        that follow, a rank has every ``ranks``-th. Where the order is shuffled, batches at the end
        of an epoch that do not make a round of all ranks are left out. An epoch's end goes with the
        window behind it, which is the next epoch's: whoever reads a window ahead reads that.
        """
        ends: list[None] = []
        for epoch in epochs:
            for batches in self._share(epoch, skip):
                if batches:
                    yield [*ends, *batches]
                    ends = []
            ends.append(None)
            skip = 0
        yield [*ends]

    def _share(self, epoch: int, skip: int) -> Iterator[list[Array]]:
        """Yield this rank's batches of each window of an epoch."""
        held: list[Array] = []
        for batches in self._batches(epoch):
            dropped = min(skip, len(batches))
            skip -= dropped
            held += batches[dropped:]
            whole = len(held) - len(held) % self._ranks
            yield held[self._rank : whole : self._ranks]
            held = held[whole:]
        if not self._shuffle:
            yield held[self._rank : self._rank + 1]

    def _batches(self, epoch: int) -> Iterator[list[Array]]:
        """Yield the batches of each window; what does not fill its last one goes to the next."""
        generator = np.random.default_rng([self._seed, epoch])
        subset = self._subset
        blocks = np.arange(self._split.manifest.blocks) if subset is None else subset.blocks
        if self._shuffle:
            blocks = generator.permutation(blocks)
        left_S3 = np.empty((0, 3), np.int64)
        for start in range(0, len(blocks), WINDOW):
            items_S3 = self._items(blocks[start : start + WINDOW].tolist())
            if self._shuffle:
                items_S3 = items_S3[generator.permutation(len(items_S3))]
            items_S3 = np.concatenate([left_S3, items_S3])
            lengths, ahead = items_S3[:, 2].tolist(), AHEAD if self._shuffle else 0
            parts = cut_parts(lengths, self._batch_tokens, ahead=ahead)
            batches = [items_S3[part] for part in parts]
            if start + WINDOW < len(blocks):
                left_S3 = batches.pop()
            yield [batch for batch in batches if len(batch)]

    def _items(self, blocks: list[int]) -> Array:
        """Return the sequences of some blocks that are wanted."""
        parts = []
        for block in blocks:
            _, rows_S2, document_S = self._split.sequences(block)
            place_S = np.arange(len(rows_S2))
            if self._subset is not None:
                place_S = place_S[np.isin(document_S, self._subset.documents)]
            length_S = (rows_S2[:, 1] - rows_S2[:, 0])[place_S]
            parts.append(np.stack([np.full_like(place_S, block), place_S, length_S], axis=1))
        return np.concatenate(parts)
