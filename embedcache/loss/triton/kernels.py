"""What `absorb` does, its oracle, each in one Triton kernel.

One program has one position, whose logits it reads once: each block's are turned into slopes as
soon as they are there. They are relative to the highest logit of the first block, which is near the
highest of all; where a later one is too far above that for exp, what was written is scaled down.

Axes: R positions, C columns of a tile, B columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedcache.loss.online_softmax import Running
from embedcache.loss.tiles import Tile
from embedcache.units import rounded_up

BLOCK = 4096
"""VocabSubset at a time."""
LANES = 16
"""VocabSubset a thread: two 16-byte loads of bfloat16."""
FAR = 60.0
"""Nats by which a logit may be above the one that all are relative to: float32 and bfloat16 hold
e^88, and sums of many e^60. In float16, whose largest is e^11, none is."""


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
    # Of few columns there is little to read at a time: smaller programs hide each other's waits.
    block = min(BLOCK if columns > 4 * BLOCK else BLOCK // 2, triton.next_power_of_2(columns))
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
            FAR=0.0 if logits_RC.dtype == torch.float16 else FAR,
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
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    label = tl.load(targets + row) - start
    if (label >= 0) & (label < columns):
        value, _ = logits_of(
            tl.load(logits + label), label, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
        )
        tl.store(labels + row, value)
    if NEEDS_GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before any writes there

    before = tl.load(peaks + row)
    peak = before
    total_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, padded, BLOCK):
        place_B = first + tl.arange(0, BLOCK)
        # The padding is read, too: a mask of 16 columns keeps loads wide whatever C is.
        raw_B = tl.load(logits + place_B, mask=place_B < padded, other=0.0)
        value_B, slope_B = logits_of(
            raw_B, place_B, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
        )
        highest = tl.max(value_B, axis=0)
        if (highest > peak + FAR) | ((first == 0) & (highest > peak)):
            lower = tl.exp(peak - highest)
            total_B *= lower
            if NEEDS_GRADIENT:
                tl.debug_barrier()
                for earlier in range(0, first, BLOCK):
                    written = logits + earlier + tl.arange(0, BLOCK)
                    slopes_B = tl.load(written).to(tl.float32) * lower
                    tl.store(written, slopes_B.to(raw_B.dtype))
            peak = highest
        share_B = tl.exp(value_B - peak)
        total_B += share_B
        if NEEDS_GRADIENT:
            slope_B = tl.where(place_B == label, 0.0, slope_B * share_B)
            tl.store(logits + place_B, slope_B.to(raw_B.dtype), mask=place_B < padded)

    shrink = tl.exp(before - peak)
    tl.store(peaks + row, peak)
    tl.store(totals + row, tl.load(totals + row) * shrink + tl.sum(total_B, axis=0))
    tl.store(shrinks + row, shrink)


def combine_by_triton(
    sum_RH: Tensor,
    factor_R: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: Tensor,
) -> None:
    """Do what `combine` does; all matrices' rows are contiguous, factors need not be."""
    rows, hidden = sum_RH.shape
    if not rows:
        return
    weight_CH, place_R, label_R = label or (None, None, None)
    with torch.cuda.device_of(sum_RH):
        _combine[(rows,)](
            sum_RH,
            factor_R,
            factor_R.stride(0),
            weight_CH,
            0 if weight_CH is None else weight_CH.stride(0),
            place_R,
            label_R,
            out,
            hidden,
            BLOCK=min(1024, triton.next_power_of_2(hidden)),
        )


@triton.jit
def _combine(
    sums,
    factors,
    factor_stride,
    weight,
    weight_stride,
    places,
    labels,
    out,
    hidden,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row * factor_stride)
    if weight is not None:
        label = tl.load(labels + row)
        weight += tl.load(places + row).to(tl.int64) * weight_stride
    for first in range(0, hidden, BLOCK):
        place_B = first + tl.arange(0, BLOCK)
        inside_B = place_B < hidden
        sum_B = tl.load(sums + row * hidden + place_B, mask=inside_B).to(tl.float32)
        value_B = sum_B * factor
        if weight is not None:
            value_B += tl.load(weight + place_B, mask=inside_B).to(tl.float32) * label
        tl.store(out + row * hidden + place_B, value_B.to(out.dtype.element_ty), mask=inside_B)


@triton.jit
def logits_of(
    raw,
    place,
    bias,
    log_weight,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    OF_ROWS: tl.constexpr = False,
):
    """Return the logits of products ``raw``, and their slopes but for the scale.

    ``place`` are their columns; ``raw`` is a row of those, or ``OF_ROWS``.
    """
    value = raw.to(tl.float32)
    inside = place < columns
    if bias is not None:
        value += _across(tl.load(bias + place, mask=inside, other=0.0).to(tl.float32), OF_ROWS)
    value *= scale
    slope = tl.where(_across(inside, OF_ROWS), 1.0, 0.0)
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0)
        slope *= 1.0 - tanh * tanh
        value = tanh * softcap
    if log_weight is not None:
        value += _across(tl.load(log_weight + place, mask=inside, other=0.0), OF_ROWS)
    inside = _across(inside, OF_ROWS)
    return tl.where(inside, value, float("-inf")), tl.where(inside, slope, 0.0)


@triton.jit
def _across(values, OF_ROWS: tl.constexpr):
    """Return columns' values as a row, where they are for several rows."""
    if OF_ROWS:
        return values[None, :]
    else:  # noqa: RET505 - Triton compiles what follows a return
        return values
