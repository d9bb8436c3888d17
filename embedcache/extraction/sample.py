"""Batches of some blocks, spread evenly over them: what calibrating and measuring compute.

They are batches of the run itself (which sequences are computed together is a function of the
block), so a run takes over what was computed of them and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.base.forward import BlockForward
from embedcache.cache.tokens.reader import SplitTokens

Array = np.ndarray[Any, Any]
Item = tuple[str, int]
"""A split and the number of one of its blocks."""
Known = dict[Item, dict[int, dict[str, torch.Tensor]]]
"""x_BTH by tap, on the host, of batches by their number, by block."""

TRIES = 64
"""Places looked at, at most: batches that are yielded, at most."""
PLASTIC = (0.7548776662466927, 0.5698402909980532)
"""Steps of the evenest sequence of points in a square (Roberts' R2): block by place in it."""


@dataclass(frozen=True, slots=True)
class SampledBlock:
    """A block that is sampled."""

    ids_N: Array
    rows_S2: Array
    batches: list[list[int]]

    def rows(self, number: int) -> Array:
        """Return rows_B2, the first row and the one past the last of a batch's sequences."""
        rows_B2: Array = self.rows_S2[self.batches[number]]
        return rows_B2


def spread(
    splits: dict[str, SplitTokens],
    items: list[Item],
    forward: BlockForward,
    blocks: dict[Item, SampledBlock],
) -> Iterator[tuple[Item, int]]:
    """Yield (block, number of a batch in it), none twice, reading into ``blocks`` on the way."""
    seen: set[tuple[Item, int]] = set()
    for step in range(TRIES):
        across, within = ((0.5 + step * plastic) % 1 for plastic in PLASTIC)
        item = items[int(across * len(items))]
        if item not in blocks:
            ids_N, rows_S2, _ = splits[item[0]].read(item[1])
            blocks[item] = SampledBlock(ids_N, rows_S2, forward.batches(rows_S2))
        count = len(blocks[item].batches)
        for place in range(count):
            number = (int(within * count) + place) % count
            if (item, number) not in seen:
                seen.add((item, number))
                yield item, number
                break


def rows_of(x_BTH: torch.Tensor, rows_B2: Array) -> torch.Tensor:
    """Return x_NH of the tokens of a batch, padding left out."""
    return torch.cat([x[: stop - first] for x, (first, stop) in zip(x_BTH, rows_B2, strict=True)])


def ids_of(ids_N: Array, rows_B2: Array) -> Array:
    """Return the ids of the tokens of a batch, given those of its block."""
    return np.concatenate([ids_N[first:stop] for first, stop in rows_B2.tolist()])
