"""The learning rate by tokens seen: no pass over the data is needed to know its end."""

from __future__ import annotations

import math


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Return the rate at a share ``progress`` of all tokens: linear warm-up, then a cosine to 0.

    >>> [round(learning_rate(p, peak=1.0, warmup=0.5), 3) for p in (0.25, 0.5, 0.75, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return peak * progress / warmup
    along = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * along))
