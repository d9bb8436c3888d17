"""A sample of a split's embeddings, to calibrate on."""

from __future__ import annotations

from itertools import pairwise

import torch

from embedcache.cache.split_reader import SplitReader
from embedcache.errors import NumericsError

SAMPLED = 4
"""Blocks that are read."""


def sample_embeddings(split: SplitReader, taps: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the embeddings of up to four blocks spread over the split, by tap.

    Blocks that nothing can be read of are passed over.
    """
    numbers = [
        found
        for first, stop in pairwise(
            split.manifest.blocks * i // SAMPLED for i in range(SAMPLED + 1)
        )
        if (found := next((b for b in range(first, stop) if len(split.sequences(b)[0])), -1)) >= 0
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
                f"the sampled train embeddings of tap {tap} hold values that are not finite, or no "
                "readable sequence: this cache cannot be trained on. Extract it again, with "
                "--dtype float32 if the base overflows."
            )
    return sample
