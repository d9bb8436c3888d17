"""What `absorb` does, its oracle, each in one Triton kernel.

One program has one position: it reads its logits once for peak, total and label, and again to
write the slopes in their place. Where a tile's rows in flight fit the L2 cache the second reading
costs no memory traffic.

Axes: R positions, C columns of a tile, B columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedcache.loss.running import Running
from embedcache.loss.tiles import Tile
from embedcache.units import rounded_up

BLOCK = 8192
"""Columns at a time: two 16-byte loads of bfloat16 for each of 512 threads."""
LANES = 16
"""Columns a thread."""


def absorb_by_triton(
    logits_RC: Tensor,
    tile: Tile,
    targets_R: Tensor,
    running: Running,
    *,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor:
    """Do what `absorb` does.

    What lies between rows of ``logits_RC`` is lost: up to 15 values a row are read and written.
    """
    rows, columns = logits_RC.shape
    shrink_R = torch.empty_like(running.peak_R)
    if not rows:
        return shrink_R
    # Of few columns the second reading comes from the nearest cache: small programs hide its wait.
    block = min(BLOCK if columns > 2 * BLOCK else BLOCK // 4, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits_RC):  # Triton launches on the current device
        _absorb[(rows,)](
            logits_RC,
            logits_RC.stride(0),
            targets_R,
            tile.start,
            running.peak_R,
            running.total_R,
            running.label_R,
            shrink_R,
            tile.columns.bias_C,
            tile.columns.log_weight_C,
            columns,
            min(logits_RC.stride(0), rounded_up(columns, 16)),
            scale,
            1.0 if softcap is None else softcap,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            BLOCK=block,
            num_warps=max(1, block // (32 * LANES)),
        )
    return shrink_R


@triton.jit
def _absorb(
    logits,
    stride,
    targets,
    start,
    peaks,
    totals,
    labels,
    shrinks,
    bias,
    log_weight,
    columns,
    padded,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    # A peak and a total for each lane: no lane waits for another until the end.
    peak_B = tl.full([BLOCK], -3.0e38, tl.float32)
    total_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, padded, BLOCK):
        place_B = first + tl.arange(0, BLOCK)
        # The padding is read, too: a mask of 16 columns keeps loads wide whatever C is.
        raw_B = tl.load(logits + place_B, mask=place_B < padded, other=0.0)
        value_B, _ = _logit(raw_B, place_B, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP)
        above_B = value_B - peak_B
        smaller_B = tl.exp(-tl.abs(above_B))
        total_B = tl.where(above_B > 0, total_B * smaller_B + 1.0, total_B + smaller_B)
        peak_B = tl.maximum(peak_B, value_B)

    before = tl.load(peaks + row)
    peak = tl.maximum(before, tl.max(peak_B, axis=0))
    shrink = tl.exp(before - peak)
    total = tl.load(totals + row) * shrink + tl.sum(total_B * tl.exp(peak_B - peak), axis=0)
    label = tl.load(targets + row) - start
    if (label >= 0) & (label < columns):
        value, _ = _logit(
            tl.load(logits + label), label, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
        )
        tl.store(labels + row, value)
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(shrinks + row, shrink)
    if NEEDS_GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before any writes there
        for first in range(0, padded, BLOCK):
            place_B = first + tl.arange(0, BLOCK)
            raw_B = tl.load(logits + place_B, mask=place_B < padded, other=0.0)
            value_B, slope_B = _logit(
                raw_B, place_B, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
            )
            slope_B *= tl.exp(value_B - peak)
            slope_B = tl.where(place_B == label, 0.0, slope_B)
            tl.store(logits + place_B, slope_B.to(raw_B.dtype), mask=place_B < padded)


def combine_by_triton(
    sum_RH: Tensor,
    factor_R: Tensor,
    weight_CH: Tensor,
    place_R: Tensor,
    label_R: Tensor,
    *,
    out: Tensor,
) -> None:
    """Do what `combine` does; all matrices' rows are contiguous."""
    rows, hidden = sum_RH.shape
    if not rows:
        return
    with torch.cuda.device_of(sum_RH):
        _combine[(rows,)](
            sum_RH,
            factor_R,
            weight_CH,
            weight_CH.stride(0),
            place_R,
            label_R,
            out,
            hidden,
            BLOCK=min(1024, triton.next_power_of_2(hidden)),
        )


@triton.jit
def _combine(
    sums, factors, weight, weight_stride, places, labels, out, hidden, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor, label = tl.load(factors + row), tl.load(labels + row)
    weight += tl.load(places + row).to(tl.int64) * weight_stride
    for first in range(0, hidden, BLOCK):
        place_B = first + tl.arange(0, BLOCK)
        inside_B = place_B < hidden
        sum_B = tl.load(sums + row * hidden + place_B, mask=inside_B).to(tl.float32)
        weight_B = tl.load(weight + place_B, mask=inside_B).to(tl.float32)
        value_B = sum_B * factor + weight_B * label
        tl.store(out + row * hidden + place_B, value_B.to(out.dtype.element_ty), mask=inside_B)


@triton.jit
def _logit(raw, place, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the logits of products ``raw``, and their slopes but for the scale."""
    value = raw.to(tl.float32)
    inside = place < columns
    if bias is not None:
        value += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    value *= scale
    slope = tl.where(inside, 1.0, 0.0)
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0)
        slope *= 1.0 - tanh * tanh
        value = tanh * softcap
    if log_weight is not None:
        value += tl.load(log_weight + place, mask=inside, other=0.0)
    return tl.where(inside, value, float("-inf")), tl.where(inside, slope, 0.0)
