"""The softmax of a tile that is all of it, on a CPU: a few passes over what its caches hold.

Axes: R positions, C columns of the tile, B positions of a block, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedcache.loss.vocab_subset import VocabSubset

BLOCK_BYTES = 2 << 20
"""Bytes of a block's logits in float32."""
LEAST = 1e-30
"""A label's probability below which its logarithm is computed otherwise: it has few digits left."""


def whole(
    x_RH: Tensor,
    columns: VocabSubset,
    targets_R: Tensor,
    *,
    out: Tensor,
    scale: float,
    needs_gradient: bool,
) -> Tensor:
    """Return the loss of each position, [R], and put its slopes into ``out``, [R, C].

    Slopes are d(loss) / d(product of embedding and head row): their product with the head's rows is
    the gradient. Without ``needs_gradient`` what is in ``out`` is lost.
    """
    torch.mm(x_RH, columns.weight_CH.T, out=out)
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = max(1, BLOCK_BYTES // (wide.itemsize * out.shape[1]))
    place_R1 = targets_R.clamp(0, out.shape[1] - 1)[:, None]
    losses = []
    for logits_BC, place_B1 in zip(out.split(rows), place_R1.split(rows), strict=True):
        chance_BC = _logits(logits_BC.to(wide, copy=True), columns, scale)
        torch.softmax(chance_BC, dim=1, out=chance_BC)
        log_B1 = chance_BC.gather(1, place_B1).log_()
        if log_B1.min() < math.log(LEAST):
            few_B = log_B1[:, 0] < math.log(LEAST)
            few_BC = _logits(logits_BC[few_B].to(wide), columns, scale)
            label_B1 = few_BC.gather(1, place_B1[few_B])
            log_B1[few_B] = label_B1 - few_BC.logsumexp(dim=1, keepdim=True)
        losses.append(log_B1[:, 0])
        if needs_gradient:
            # p - 1 has all its digits so, also where the model is right.
            chance_BC.scatter_(1, place_B1, log_B1.expm1())
            if scale != 1.0:
                chance_BC.mul_(scale)
            logits_BC.copy_(chance_BC)
    loss_R = torch.cat(losses).neg_()
    return loss_R.masked_fill_(targets_R != place_R1[:, 0], torch.nan)


def _logits(product_BC: Tensor, columns: VocabSubset, scale: float) -> Tensor:
    """Make logits of products with the head's rows, in place."""
    if columns.bias_C is not None:
        product_BC.add_(columns.bias_C)
    if scale != 1.0:
        product_BC.mul_(scale)
    if columns.log_weight_C is not None:
        product_BC.add_(columns.log_weight_C)
    return product_BC
