"""The order of batches: which sequences make which batch, and which rank takes it.

Blocks are shuffled, then the sequences in each window of blocks. Batches are filled up to a number
of tokens and assigned to the ranks in turn. The order is a pure function of (seed, epoch,
position), computed one window at a time.

Axes: S sequences of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from embedcache.cache.split_reader import SplitReader
from embedcache.data.packing import group_by_tokens
from embedcache.data.subset import Subset
from embedcache.errors import UsageError

Array = np.ndarray[Any, Any]

WINDOW = 8
"""Number of blocks whose sequences are shuffled together."""
LOOK_AHEAD = 64
"""Most sequences that a batch skips, because they do not fit, in favour of later ones that do.
Without it, batches of long sequences would be a tenth empty, or more."""


class BatchOrder:
    """The batches of one rank, as arrays [S, 3] of (block, index in the block, length).

    The arguments are those of `embedcache.data.loader.BatchLoader`.
    """

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
                f"expected `rank=` from 0 to {ranks - 1} with `ranks=` {ranks}, found {rank}. "
                "For two processes pass `ranks=` 2, and `rank=` 0 in one and 1 in the other."
            )
        self._split = split
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._shuffle = shuffle
        self._subset = subset
        self._rank = rank
        self._ranks = ranks

    def windows(self, epochs: range, skip: int) -> Iterator[list[Array | None]]:
        """Yield this rank's batches window by window, with None where an epoch ends.

        The first ``skip`` batches of the first epoch, counted over all ranks, are left out. Windows
        without batches of this rank are not yielded. The end of an epoch comes with the first
        window of the next epoch, so that reading one window ahead reads across epochs.
        """
        epoch_ends: list[None] = []
        for epoch in epochs:
            for batches in self._of_rank(epoch, skip):
                if batches:
                    yield [*epoch_ends, *batches]
                    epoch_ends = []
            epoch_ends.append(None)
            skip = 0
        yield [*epoch_ends]

    def _of_rank(self, epoch: int, skip: int) -> Iterator[list[Array]]:
        """Yield this rank's batches of each window of an epoch: one of each round of all ranks."""
        waiting: list[Array] = []
        for batches in self._of_all_ranks(epoch):
            dropped = min(skip, len(batches))
            skip -= dropped
            waiting += batches[dropped:]
            full_rounds = len(waiting) - len(waiting) % self._ranks
            yield waiting[self._rank : full_rounds : self._ranks]
            waiting = waiting[full_rounds:]
        if not self._shuffle:
            yield waiting[self._rank : self._rank + 1]

    def _of_all_ranks(self, epoch: int) -> Iterator[list[Array]]:
        """Yield the batches of each window; the last batch is completed by the next window."""
        generator = np.random.default_rng([self._seed, epoch])
        subset = self._subset
        blocks = np.arange(self._split.manifest.blocks) if subset is None else subset.blocks
        if self._shuffle:
            blocks = generator.permutation(blocks)
        rest_S3 = np.empty((0, 3), np.int64)
        for start in range(0, len(blocks), WINDOW):
            items_S3 = self._items(blocks[start : start + WINDOW].tolist())
            if self._shuffle:
                items_S3 = items_S3[generator.permutation(len(items_S3))]
            items_S3 = np.concatenate([rest_S3, items_S3])
            groups = group_by_tokens(
                items_S3[:, 2].tolist(),
                self._batch_tokens,
                look_ahead=LOOK_AHEAD if self._shuffle else 0,
            )
            batches = [items_S3[group] for group in groups]
            if start + WINDOW < len(blocks):
                rest_S3 = batches.pop()
            yield [batch for batch in batches if len(batch)]

    def _items(self, blocks: list[int]) -> Array:
        """Return the sequences of some blocks that belong to the subset, [S, 3]."""
        items = []
        for block in blocks:
            _, rows_S2, document_S = self._split.sequences(block)
            index_S = np.arange(len(rows_S2))
            if self._subset is not None:
                index_S = index_S[np.isin(document_S, self._subset.documents)]
            length_S = (rows_S2[:, 1] - rows_S2[:, 0])[index_S]
            items.append(np.stack([np.full_like(index_S, block), index_S, length_S], axis=1))
        return np.concatenate(items)
