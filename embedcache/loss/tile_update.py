"""Adds a tile's logits to the running softmax, and makes the gradient of it, in PyTorch.

Axes: R positions, C columns of a tile, B positions of a block, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.loss.online_softmax import Running
from embedcache.loss.tiles import Tile

BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""Bytes of float32 logits copied at a time, where a copy is needed; a CPU's stay in its cache."""

RUNS = 32
"""Runs of equal factors that are worth a product each."""


def absorb(
    logits_RC: Tensor,
    tile: Tile,
    targets_R: Tensor,
    running: Running,
    *,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor:
    """Add a tile to the running softmax; return by what earlier sums of slopes shrink, [R].

    ``logits_RC`` holds products of embeddings and head rows. If ``needs_gradient`` it is turned,
    in place, into the slopes exp(logit - peak) · d(logit) / d(scaled product), 0 at the label;
    else its content is lost.
    """
    wide = running.peak_R.dtype
    shrink_R = torch.empty_like(running.peak_R)
    step = max(1, len(logits_RC))
    if logits_RC.dtype != wide or softcap is not None:
        block = BLOCK_BYTES.get(logits_RC.device.type, BLOCK_BYTES["cuda"])
        step = max(1, block // (wide.itemsize * logits_RC.shape[1]))
    for start in range(0, len(logits_RC), step):
        rows = slice(start, start + step)
        block_BC, seen, columns = logits_RC[rows], running.of(rows), tile.columns
        value_BC = block_BC.to(wide)  # the block itself where the dtype is the same
        if columns.bias_C is not None:
            value_BC.add_(columns.bias_C)
        if scale != 1.0:
            value_BC.mul_(scale)
        slope_BC = None
        if softcap is not None:
            value_BC.div_(softcap).tanh_()
            if needs_gradient:
                slope_BC = value_BC.square().neg_().add_(1.0)
            value_BC.mul_(softcap)
        if columns.log_weight_C is not None:
            value_BC.add_(columns.log_weight_C)

        place_B1 = (targets_R[rows] - tile.start)[:, None]
        here_B1 = (place_B1 >= 0) & (place_B1 < value_BC.shape[1])
        place_B1 = place_B1.clamp(0, value_BC.shape[1] - 1)
        label_B1 = value_BC.gather(1, place_B1)
        seen.label_R.copy_(torch.where(here_B1, label_B1, seen.label_R[:, None])[:, 0])

        peak_B = torch.maximum(seen.peak_R, value_BC.amax(dim=1))
        shrink_R[rows] = torch.exp(seen.peak_R - peak_B)
        value_BC.sub_(peak_B[:, None]).exp_()
        seen.total_R.mul_(shrink_R[rows]).add_(value_BC.sum(dim=1))
        seen.peak_R.copy_(peak_B)
        if not needs_gradient:
            continue
        if slope_BC is not None:
            value_BC.mul_(slope_BC)
        kept_B1 = value_BC.gather(1, place_B1).masked_fill_(here_B1, 0.0)
        value_BC.scatter_(1, place_B1, kept_B1)
        if value_BC is not block_BC:
            block_BC.copy_(value_BC)
    return shrink_R


def combine(
    sum_RH: Tensor,
    factor_R: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: Tensor,
) -> None:
    """Put into ``out`` sums times a factor, and the label's row of the head times another.

    ``label`` are the head's weight_CH, place_R there, and factors, [R].
    """
    if label is None:
        runs = _runs(factor_R) if sum_RH.is_cpu and sum_RH.dtype != factor_R.dtype else []
        for rows, factor in runs:
            torch.mul(sum_RH[rows], factor, out=out[rows])  # rounded once all the same
        if not runs:
            torch.mul(sum_RH, factor_R[:, None], out=out)  # nothing wider is made on the way
        return
    weight_CH, place_R, label_R = label
    gradient_RH = sum_RH * factor_R[:, None]  # wide until it is whole
    out.copy_(gradient_RH.add_(weight_CH[place_R] * label_R[:, None]))


def _runs(factor_R: Tensor) -> list[tuple[slice, Tensor]]:
    """Return the rows of equal factors that lie side by side, if they are few: else none.

    A loss's mean gives all of its positions one, and a CPU multiplies by a single number in a third
    of the time.
    """
    each, count = torch.unique_consecutive(factor_R, return_counts=True)
    if len(each) > RUNS:
        return []
    ends = count.cumsum(0).tolist()
    return [
        (slice(start, end), factor)
        for start, end, factor in zip([0, *ends], ends, each, strict=False)
    ]
