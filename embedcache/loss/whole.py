"""The softmax of a tile that is all of it, on a CPU: a few passes over what its caches hold.

Axes: R positions, C columns of the tile, B positions of a block, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedcache.loss.running import Running
from embedcache.loss.tiles import Tile

BLOCK_BYTES = 2 << 20
"""Bytes of a block's logits in float32."""
LEAST = 1e-30
"""A label's probability below which its logarithm is computed otherwise: it has few digits left."""


def whole(
    x_RH: Tensor,
    tile: Tile,
    targets_R: Tensor,
    seen: Running,
    *,
    out: Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> None:
    """Put into ``seen`` what gives the loss, and into ``out`` the loss's slopes, [R, C].

    Slopes are d(loss) / d(product of embedding and head row): their product with the head's rows is
    the gradient. ``softcap`` must be None.
    """
    assert softcap is None
    columns = tile.columns
    torch.mm(x_RH, columns.weight_CH.T, out=out)
    step = max(1, BLOCK_BYTES // (seen.total_R.itemsize * out.shape[1]))
    value_BC, chance_BC = seen.total_R.new_empty(2, min(step, len(out)), out.shape[1])
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        logits_BC, last = out[rows], len(out) - start
        value_BC, chance_BC = value_BC[:last], chance_BC[:last]
        value_BC.copy_(logits_BC)
        if columns.bias_C is not None:
            value_BC.add_(columns.bias_C)
        if scale != 1.0:
            value_BC.mul_(scale)
        if columns.log_weight_C is not None:
            value_BC.add_(columns.log_weight_C)
        torch.softmax(value_BC, dim=1, out=chance_BC)

        place_B1 = (targets_R[rows] - tile.start)[:, None]
        here_B1 = (place_B1 >= 0) & (place_B1 < out.shape[1])
        place_B1 = place_B1.clamp(0, out.shape[1] - 1)
        loss_B1 = -chance_BC.gather(1, place_B1).log()
        small_B = loss_B1[:, 0] > -math.log(LEAST)
        if small_B.any():
            few_BC = value_BC[small_B]
            label_B1 = few_BC.gather(1, place_B1[small_B])
            loss_B1[small_B] = few_BC.logsumexp(dim=1, keepdim=True) - label_B1
        seen.peak_R[rows] = loss_B1[:, 0]
        seen.label_R[rows] = torch.where(here_B1, 0.0, torch.nan)[:, 0]
        seen.total_R[rows] = 1.0
        if needs_gradient:
            # p - 1 has all its digits so, also where the model is right.
            chance_BC.scatter_(1, place_B1, torch.expm1(-loss_B1))
            if scale != 1.0:
                chance_BC.mul_(scale)
            logits_BC.copy_(chance_BC)
