"""The probabilities by which the tail of a shortlist is drawn.

Axes: N positions, n positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss.chunks import plan_chunks

POWER = 0.35
"""Power of the mean squared probability by which the tail is drawn. A half is best if the mean is
known; a sample knows little of rare tokens, and less than a half trains better."""

POWER_BESIDE_TOP_IDS = 0.7
"""Power of the mean probability by which the tail is drawn where a shortlist holds all likely
tokens. The rest varies little between positions, but all positions of a shortlist share their
draws, and this choice makes the error that they share in the gradient smallest: little more than
half of the error that the mean square makes with as many draws."""

UNIFORM_SHARE = 0.1
"""Share of the draws that is uniform, for tokens that the base thought impossible."""


def tail_proposal(x_NH: Tensor, head: Head, *, held: float | None = None) -> Tensor:
    """Return the probability of each token to be drawn, float32 [V], which sums to 1.

    The variance of an estimated sum is least if a token is drawn in proportion to the root of the
    mean square of its probability.

    Args:
        x_NH: a sample of the base's final embeddings, over which means are taken.
        head: the base's head.
        held: the probability from which on a shortlist holds a token as a top id; means are then
            taken over the smaller probabilities alone. None without top ids.
    """
    N, V = len(x_NH), len(head.weight_VH)
    sum_V = torch.zeros(V, device=x_NH.device)
    for chunk in plan_chunks(N, V, torch.float32, x_NH.device).of_rows(N):
        probability_nV = torch.softmax(head(x_NH[chunk]).float(), dim=1)
        if held is None:
            sum_V += probability_nV.square_().sum(dim=0)
        else:
            sum_V += probability_nV.masked_fill_(probability_nV >= held, 0).sum(dim=0)
    weight_V = sum_V ** (POWER if held is None else POWER_BESIDE_TOP_IDS)
    return (1 - UNIFORM_SHARE) * weight_V / weight_V.sum() + UNIFORM_SHARE / V
