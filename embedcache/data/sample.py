"""A sample of a split's embeddings.

Axes: N tokens, H hidden, S sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from embedcache.cache.split_reader import SplitReader
from embedcache.errors import NumericsError

BLOCKS = 4
"""Number of blocks that are read."""


def sample_embeddings(split: SplitReader, taps: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return x_NH by tap: the embeddings of up to `BLOCKS` blocks, spread evenly over the split.

    A block without readable sequences is replaced by the next block that has some.

    Raises:
        NumericsError: if there is no readable sequence or a value is not finite.
    """
    edges = pairwise(split.manifest.blocks * i // BLOCKS for i in range(BLOCKS + 1))
    numbers = [
        readable
        for first, stop in edges
        if (readable := next((b for b in range(first, stop) if len(split.sequences(b)[0])), -1))
        >= 0
    ]
    blocks = [split.block(number, taps) for number in numbers or [0]]
    sample = {
        tap: torch.cat(
            [block.x_NH[tap][:0] for block in blocks]
            + [block.x_NH[tap][a:b] for block in blocks for a, b in block.rows_S2.tolist()]
        )
        for tap in taps
    }
    for tap, x_NH in sample.items():
        if not len(x_NH) or not x_NH.isfinite().all():
            raise NumericsError(
                f"expected finite embeddings of tap {tap} in the {split.name} split, found values "
                "that are not finite, or no readable sequence: nothing can be trained on this "
                "cache. Extract it again, with `dtype=` float32 if the base overflows."
            )
    return sample
