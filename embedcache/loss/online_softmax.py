"""The online softmax: its state, and its update by the logits of a tile, in PyTorch.

Online normalizer calculation for softmax (arXiv 1805.02867), as in FlashAttention (arXiv
2205.14135). The kernels in `embedcache.loss.triton` compute the same.

Axes: N positions, n positions of a block, C columns of a tile, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedcache.loss.tiles import Tile

BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""Bytes of float32 logits that are copied at a time, where a copy is needed; on a CPU they stay in
its cache."""


@dataclass(frozen=True, slots=True)
class OnlineSoftmax:
    """The softmax of each position over the columns seen so far; updated in place.

    Attributes:
        peak_N: the largest logit, or one that is near enough to it for exp.
        total_N: the sum of exp(logit - peak).
        label_N: the label's logit, NaN before the label's tile was seen.
    """

    peak_N: Tensor
    total_N: Tensor
    label_N: Tensor

    @classmethod
    def empty(cls, positions: int, dtype: torch.dtype, device: torch.device) -> OnlineSoftmax:
        """Return the softmax of no columns."""
        # A finite lowest value: columns of -inf alone (banned tokens) must not give inf - inf.
        lowest = torch.full((positions,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return cls(lowest, torch.zeros_like(lowest), torch.full_like(lowest, torch.nan))

    def __getitem__(self, positions: slice) -> OnlineSoftmax:
        """Return a view of some positions."""
        return OnlineSoftmax(
            self.peak_N[positions], self.total_N[positions], self.label_N[positions]
        )

    def cross_entropy(self) -> Tensor:
        """Return -log p(label) of each position, [N]."""
        return (self.peak_N - self.label_N) + self.total_N.log()  # a small sum keeps its digits


def update(
    logits_NC: Tensor,
    tile: Tile,
    targets_N: Tensor,
    softmax: OnlineSoftmax,
    *,
    needs_gradient: bool,
) -> Tensor:
    """Add the logits of a tile to the softmax; return the factor of earlier sums, rescale_N.

    Args:
        logits_NC: products of embeddings with the tile's rows of the head. If ``needs_gradient``,
            they are replaced by the unnormalised dlogits exp(logit - peak) · d(logit) / d(scaled
            product), with 0 at the label. Otherwise their content is undefined afterwards.
        tile: the columns of the logits.
        targets_N: index of each label among all columns of the softmax.
        softmax: the state to update.
        needs_gradient: whether dlogits are computed.
    """
    subset, dtype = tile.subset, softmax.peak_N.dtype
    rescale_N = torch.empty_like(softmax.peak_N)
    step = max(1, len(logits_NC))
    if logits_NC.dtype != dtype or subset.softcap is not None:
        block_bytes = BLOCK_BYTES.get(logits_NC.device.type, BLOCK_BYTES["cuda"])
        step = max(1, block_bytes // (dtype.itemsize * logits_NC.shape[1]))
    for start in range(0, len(logits_NC), step):
        block = slice(start, start + step)
        logits_nC, state = logits_NC[block], softmax[block]
        value_nC = logits_nC.to(dtype)  # not a copy if the dtype is the same
        if subset.bias_C is not None:
            value_nC.add_(subset.bias_C)
        if subset.scale != 1.0:
            value_nC.mul_(subset.scale)
        slope_nC = None
        if subset.softcap is not None:
            value_nC.div_(subset.softcap).tanh_()
            if needs_gradient:
                slope_nC = value_nC.square().neg_().add_(1.0)
            value_nC.mul_(subset.softcap)
        if subset.log_weight_C is not None:
            value_nC.add_(subset.log_weight_C)

        label_n1 = (targets_N[block] - tile.start)[:, None]
        inside_n1 = (label_n1 >= 0) & (label_n1 < value_nC.shape[1])
        label_n1 = label_n1.clamp(0, value_nC.shape[1] - 1)
        found_n1 = value_nC.gather(1, label_n1)
        state.label_N.copy_(torch.where(inside_n1, found_n1, state.label_N[:, None])[:, 0])

        peak_n = torch.maximum(state.peak_N, value_nC.amax(dim=1))
        rescale_N[block] = torch.exp(state.peak_N - peak_n)
        value_nC.sub_(peak_n[:, None]).exp_()
        state.total_N.mul_(rescale_N[block]).add_(value_nC.sum(dim=1))
        state.peak_N.copy_(peak_n)
        if not needs_gradient:
            continue
        if slope_nC is not None:
            value_nC.mul_(slope_nC)
        value_n1 = value_nC.gather(1, label_n1).masked_fill_(inside_n1, 0.0)
        value_nC.scatter_(1, label_n1, value_n1)
        if value_nC is not logits_nC:
            logits_nC.copy_(value_nC)
    return rescale_N


def combine(
    sum_NH: Tensor,
    factor_N: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: Tensor,
) -> None:
    """Write factor · sum, plus the label's row of the head times a factor of its own.

    Args:
        sum_NH: the sums, unnormalised gradients for example.
        factor_N: their factors.
        label: a matrix [..., H], index_N, the rows of it that belong to the labels, and the
            factors of these rows, [N]. By default there is no label term.
        out: the result, [N, H], in any dtype.
    """
    if label is None:
        torch.mul(sum_NH, factor_N[:, None], out=out)  # nothing wider is allocated
        return
    weight_CH, index_N, label_N = label
    gradient_NH = sum_NH * factor_N[:, None]
    out.copy_(gradient_NH.add_(weight_CH[index_N] * label_N[:, None]))
