"""A softmax of a single tile, on a CPU: a few passes over what its caches hold.

Axes: N positions, n positions of a chunk or block, C columns, H hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedcache.loss.chunks import Chunks
from embedcache.loss.tiles import VocabSubset

BLOCK_BYTES = 2 << 20
"""Bytes of a block's logits in float32."""
LEAST_PROBABILITY = 1e-30
"""A label's probability below which its logarithm is computed from logits: fewer digits are left
in the probability."""


def one_tile_cross_entropy(
    x_NH: Tensor,
    subset: VocabSubset,
    targets_N: Tensor,
    chunks: Chunks,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return loss_N, and its gradient_NH if needed, for chunks that hold all columns.

    The arguments are those of `embedcache.loss.linear_cross_entropy`; there is no soft-cap.
    """
    buffer = x_NH.new_empty(min(len(x_NH), chunks.rows), len(subset))
    gradient_NH = torch.empty_like(x_NH) if needs_gradient else None
    loss_N = x_NH.new_empty(len(x_NH), dtype=torch.promote_types(x_NH.dtype, torch.float32))
    for chunk in chunks.of_rows(len(x_NH)):
        dlogits_nC = buffer[: chunk.stop - chunk.start]
        torch.mm(x_NH[chunk], subset.weight_CH.T, out=dlogits_nC)
        loss_N[chunk] = _softmax(dlogits_nC, subset, targets_N[chunk], needs_gradient)
        if gradient_NH is not None:
            torch.mm(dlogits_nC, subset.weight_CH, out=gradient_NH[chunk])
    return loss_N, gradient_NH


def _softmax(
    product_NC: Tensor, subset: VocabSubset, targets_N: Tensor, needs_gradient: bool
) -> Tensor:
    """Return the loss of each position; replace products by dlogits if ``needs_gradient``.

    Here dlogits are the derivatives of the loss by the products.
    """
    dtype = torch.promote_types(product_NC.dtype, torch.float32)
    block = max(1, BLOCK_BYTES // (dtype.itemsize * product_NC.shape[1]))
    label_N1 = targets_N.clamp(0, product_NC.shape[1] - 1)[:, None]
    losses = []
    for product_nC, label_n1 in zip(product_NC.split(block), label_N1.split(block), strict=True):
        probability_nC = _logits(product_nC.to(dtype, copy=True), subset)
        torch.softmax(probability_nC, dim=1, out=probability_nC)
        log_n1 = probability_nC.gather(1, label_n1).log_()
        if log_n1.min() < math.log(LEAST_PROBABILITY):
            small_n = log_n1[:, 0] < math.log(LEAST_PROBABILITY)
            logits_nC = _logits(product_nC[small_n].to(dtype), subset)
            logit_n1 = logits_nC.gather(1, label_n1[small_n])
            log_n1[small_n] = logit_n1 - logits_nC.logsumexp(dim=1, keepdim=True)
        losses.append(log_n1[:, 0])
        if needs_gradient:
            # expm1 keeps all digits of p - 1, also where the model is right.
            probability_nC.scatter_(1, label_n1, log_n1.expm1())
            if subset.scale != 1.0:
                probability_nC.mul_(subset.scale)
            product_nC.copy_(probability_nC)
    loss_N = torch.cat(losses).neg_()
    return loss_N.masked_fill_(targets_N != label_N1[:, 0], torch.nan)


def _logits(product_nC: Tensor, subset: VocabSubset) -> Tensor:
    """Turn products of embeddings with the head's rows into logits, in place."""
    if subset.bias_C is not None:
        product_nC.add_(subset.bias_C)
    if subset.scale != 1.0:
        product_nC.mul_(subset.scale)
    if subset.log_weight_C is not None:
        product_nC.add_(subset.log_weight_C)
    return product_nC
