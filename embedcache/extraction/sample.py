"""Samples of batches from all over the blocks to compute, for calibrating and estimating.

A sampled batch is a batch of the run itself, because the batches of a block follow from its
sequences alone. The run reuses what was computed of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from embedcache.base.forward import BlockForward
from embedcache.cache.tokens.reader import SplitTokens

Array = np.ndarray[Any, Any]
BlockId = tuple[str, int]
"""A split and the number of a block in it."""

MAX_BATCHES = 64
"""Largest number of batches in a sample."""
PLASTIC = (0.7548776662466927, 0.5698402909980532)
"""Steps of a low-discrepancy sequence in the unit square (Roberts' R2): block by place in it."""


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """A batch of one block.

    ``number`` is its number among the block's batches, ``ids_N`` the token ids of the block,
    ``rows_B2`` the first row and the row past the last of each sequence of the batch.
    """

    block: BlockId
    number: int
    ids_N: Array
    rows_B2: Array

    def __len__(self) -> int:
        """Return the number of tokens, padding excluded."""
        return int((self.rows_B2[:, 1] - self.rows_B2[:, 0]).sum())

    def ids(self) -> Array:
        """Return the token ids of the batch's sequences, int64 [N]."""
        return np.concatenate([self.ids_N[first:stop] for first, stop in self.rows_B2.tolist()])

    def unpadded(self, x_BTH: torch.Tensor) -> torch.Tensor:
        """Return the rows of ``x_BTH`` without padding, [N, H], in the order of `ids`."""
        rows = zip(x_BTH, self.rows_B2.tolist(), strict=True)
        return torch.cat([x_TH[: stop - first] for x_TH, (first, stop) in rows])


@dataclass(slots=True)
class ComputedBatches:
    """Embeddings of sampled batches, on the host, kept for the run."""

    batches: dict[BlockId, dict[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    """x_BTH by tap, by number of the batch, by block."""
    tokens: int = 0

    def add(self, batch: SampledBatch, x_BTH: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep the embeddings of a batch and return them on the host."""
        computed = self.batches.setdefault(batch.block, {})
        if batch.number not in computed:
            computed[batch.number] = {tap: x.cpu() for tap, x in x_BTH.items()}
            self.tokens += len(batch)
        return computed[batch.number]

    def pop(self, block: BlockId) -> dict[int, dict[str, torch.Tensor]]:
        """Return the batches of a block by number, and forget them."""
        return self.batches.pop(block, {})


def sample_batches(
    splits: dict[str, SplitTokens], blocks: list[BlockId], forward: BlockForward
) -> Iterator[SampledBatch]:
    """Yield different batches, each prefix spread evenly over the ``blocks``."""
    read: dict[BlockId, tuple[Array, Array, list[list[int]]]] = {}
    seen: set[tuple[BlockId, int]] = set()
    for step in range(MAX_BATCHES):
        across, within = ((0.5 + step * plastic) % 1 for plastic in PLASTIC)
        block = blocks[int(across * len(blocks))]
        if block not in read:
            ids_N, rows_S2, _ = splits[block[0]].read(block[1])
            read[block] = ids_N, rows_S2, forward.batches(rows_S2)
        ids_N, rows_S2, batches = read[block]
        for offset in range(len(batches)):
            number = (int(within * len(batches)) + offset) % len(batches)
            if (block, number) not in seen:
                seen.add((block, number))
                yield SampledBatch(block, number, ids_N, rows_S2[batches[number]])
                break
