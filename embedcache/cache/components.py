"""Components of an embedding that stand out: dead ones, and outliers.

A dead component carries nothing and costs a codec nothing; an outlier takes the range of a
per-token scale for itself (Dettmers et al., arXiv 2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embedcache.cache.cache import SplitReader

DEAD = 1e-3
"""Times the median standard deviation, at most."""
OUTLIER = 10.0
"""Times the median standard deviation, at least."""
SAMPLED_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What a sample of a tap's decoded embeddings says of its components."""

    count: int
    sampled_tokens: int
    median_std: float
    dead: tuple[int, ...]
    outliers: dict[int, float]
    """Times the median standard deviation, by component, the largest first."""


def describe_components(split: SplitReader) -> dict[str, Components]:
    """Return the components of every tap, from the split's middle block that has anything to read.

    Empty where every sequence is quarantined.
    """
    count = split.manifest.blocks
    for number in sorted(range(count), key=lambda block: abs(2 * block + 1 - count)):
        if len(split.sequences(number)[0]):
            block = split.block(number)
            rows = torch.cat([torch.arange(a, b) for a, b in block.rows_S2.tolist()])
            rows = rows[:: -(-len(rows) // SAMPLED_ROWS)]
            return {tap: _components(x_NH[rows]) for tap, x_NH in block.x_NH.items()}
    return {}


def _components(x_NH: torch.Tensor) -> Components:
    std_H = x_NH.float().std(dim=0, correction=0)
    # Where most components are dead, their median says nothing of the others.
    alive_H = std_H[std_H > DEAD * std_H.max()]
    median = alive_H.median().item() if len(alive_H) else 0.0
    ratio_H = std_H / median if median else torch.zeros_like(std_H)
    largest = ratio_H.argsort(descending=True)
    return Components(
        count=len(std_H),
        sampled_tokens=len(x_NH),
        median_std=median,
        dead=tuple((ratio_H <= DEAD).nonzero().flatten().tolist()),
        outliers={
            int(i): round(ratio_H[i].item(), 2) for i in largest.tolist() if ratio_H[i] > OUTLIER
        },
    )
