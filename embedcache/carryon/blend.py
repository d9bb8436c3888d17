"""The rescale dial α: y = x + α · (x′ − x)."""

from __future__ import annotations

import torch
from torch import Tensor

Alpha = float | Tensor
"""One α for all, or one a row: a tensor that broadcasts against x without its last axis."""


def blend(x: Tensor, change: Tensor, alpha: Alpha = 1.0) -> Tensor:
    """Return x + α · change, where change is x′ − x: the base at α = 0, the carry-on at α = 1.

    Args:
        x: the base's embeddings, [..., H].
        change: what the carry-on adds at α = 1, of a shape that broadcasts with ``x``.
        alpha: a number, or a tensor with one α for each row, of shape [...] or broadcasting to it.

    Rows at α = 0 equal ``x`` bit for bit, whatever ``change`` holds there.

    Source: GPT Carry-On, arXiv 2504.07513.
    """
    if isinstance(alpha, Tensor):
        scaled = alpha[..., None].to(change) * change
        return torch.where(alpha[..., None] == 0, x, x + scaled)
    if alpha == 0:
        return x
    return x + (change if alpha == 1 else alpha * change)
