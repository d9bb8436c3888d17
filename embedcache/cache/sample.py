"""A sample of a split's embeddings, to calibrate on."""

from __future__ import annotations

import torch

from embedcache.cache.reader import SplitReader
from embedcache.errors import NumericsError


def sample_embeddings(split: SplitReader, taps: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the embeddings of up to four blocks spread over the split, by tap.

    Blocks that nothing can be read of are passed over."""
    filled = [b for b in range(split.manifest.blocks) if len(split.sequences(b)[0])]
    numbers = sorted({filled[len(filled) * i // 4] for i in range(4 if filled else 0)})
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
