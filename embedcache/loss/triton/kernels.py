"""`update` and `combine` of `embedcache.loss.online_softmax`, their oracle, as Triton kernels.

A program of `update` reads the logits of one position once, and turns each block of them into
dlogits at once. These are relative to the largest logit of the first block, which is near the
largest of all; if a later logit is too far above it for exp, the dlogits written so far are scaled
down.

Axes: N positions, C columns of a tile, H hidden; lower case: a block of the axis.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedcache.loss.online_softmax import OnlineSoftmax
from embedcache.loss.tiles import Tile
from embedcache.units import round_up

BLOCK = 4096
"""Columns that a program computes at a time."""
COLUMNS_PER_THREAD = 16
"""Two 16-byte loads of bfloat16."""
MAX_ABOVE_PEAK = 60.0
"""Nats by which a logit may be above the peak: float32 and bfloat16 hold e^88, and sums of many
e^60. In float16, whose largest value is e^11, no logit may be."""


def update(
    logits_NC: Tensor,
    tile: Tile,
    targets_N: Tensor,
    softmax: OnlineSoftmax,
    *,
    needs_gradient: bool,
) -> Tensor:
    """Add the logits of a tile to the softmax; see `embedcache.loss.online_softmax.update`.

    Up to 15 elements after each row of ``logits_NC`` are read and overwritten.
    """
    rows, columns = logits_NC.shape
    subset, rescale_N = tile.subset, torch.empty_like(softmax.peak_N)
    if not rows:
        return rescale_N
    # With few columns a program loads little at a time: smaller programs hide each other's waits.
    block = min(BLOCK if columns > 4 * BLOCK else BLOCK // 2, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits_NC):  # Triton launches on the current device
        _update[(rows,)](
            logits_NC,
            logits_NC.stride(0),
            targets_N,
            tile.start,
            softmax.peak_N,
            softmax.total_N,
            softmax.label_N,
            rescale_N,
            subset.bias_C,
            subset.log_weight_C,
            columns,
            min(logits_NC.stride(0), round_up(columns, 16)),
            subset.scale,
            1.0 if subset.softcap is None else subset.softcap,
            HAS_SOFTCAP=subset.softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            MAX_ABOVE_PEAK=0.0 if logits_NC.dtype == torch.float16 else MAX_ABOVE_PEAK,
            BLOCK=block,
            num_warps=max(1, block // (32 * COLUMNS_PER_THREAD)),
        )
    return rescale_N


@triton.jit
def _update(
    logits,
    stride,
    targets,
    start,
    peaks,
    totals,
    labels,
    rescales,
    bias,
    log_weight,
    columns,
    padded,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    MAX_ABOVE_PEAK: tl.constexpr,
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
    total_c = tl.zeros([BLOCK], tl.float32)
    for first in range(0, padded, BLOCK):
        place_c = first + tl.arange(0, BLOCK)
        # Padding is read as well: a mask in steps of 16 columns keeps loads wide for any C.
        product_c = tl.load(logits + place_c, mask=place_c < padded, other=0.0)
        value_c, slope_c = logits_of(
            product_c, place_c, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
        )
        highest = tl.max(value_c, axis=0)
        if (highest > peak + MAX_ABOVE_PEAK) | ((first == 0) & (highest > peak)):
            factor = tl.exp(peak - highest)
            total_c *= factor
            if NEEDS_GRADIENT:
                tl.debug_barrier()
                for earlier in range(0, first, BLOCK):
                    written = logits + earlier + tl.arange(0, BLOCK)
                    dlogit_c = tl.load(written).to(tl.float32) * factor
                    tl.store(written, dlogit_c.to(product_c.dtype))
            peak = highest
        exp_c = tl.exp(value_c - peak)
        total_c += exp_c
        if NEEDS_GRADIENT:
            dlogit_c = tl.where(place_c == label, 0.0, slope_c * exp_c)
            tl.store(logits + place_c, dlogit_c.to(product_c.dtype), mask=place_c < padded)

    rescale = tl.exp(before - peak)
    tl.store(peaks + row, peak)
    tl.store(totals + row, tl.load(totals + row) * rescale + tl.sum(total_c, axis=0))
    tl.store(rescales + row, rescale)


def combine(
    sum_NH: Tensor,
    factor_N: Tensor,
    label: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: Tensor,
) -> None:
    """Write factor · sum and a label term; see `embedcache.loss.online_softmax.combine`.

    The rows of matrices are contiguous; factors need not be.
    """
    rows, hidden = sum_NH.shape
    if not rows:
        return
    weight_CH, index_N, label_N = label or (None, None, None)
    with torch.cuda.device_of(sum_NH):
        _combine[(rows,)](
            sum_NH,
            factor_N,
            factor_N.stride(0),
            weight_CH,
            0 if weight_CH is None else weight_CH.stride(0),
            index_N,
            label_N,
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
    indices,
    labels,
    out,
    hidden,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row * factor_stride)
    if weight is not None:
        label = tl.load(labels + row)
        weight += tl.load(indices + row).to(tl.int64) * weight_stride
    for first in range(0, hidden, BLOCK):
        place_h = first + tl.arange(0, BLOCK)
        inside_h = place_h < hidden
        sum_h = tl.load(sums + row * hidden + place_h, mask=inside_h).to(tl.float32)
        value_h = sum_h * factor
        if weight is not None:
            value_h += tl.load(weight + place_h, mask=inside_h).to(tl.float32) * label
        tl.store(out + row * hidden + place_h, value_h.to(out.dtype.element_ty), mask=inside_h)


@triton.jit
def logits_of(
    product,
    place,
    bias,
    log_weight,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr = False,
):
    """Return the logits of products, and d(logit) / d(scaled product).

    ``place`` are the columns; ``product`` has one value for each, or rows of them if ``HAS_ROWS``.
    """
    value = product.to(tl.float32)
    inside = place < columns
    if bias is not None:
        value += _broadcast(tl.load(bias + place, mask=inside, other=0.0).to(tl.float32), HAS_ROWS)
    value *= scale
    slope = tl.where(_broadcast(inside, HAS_ROWS), 1.0, 0.0)
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * value / softcap) + 1.0)
        slope *= 1.0 - tanh * tanh
        value = tanh * softcap
    if log_weight is not None:
        value += _broadcast(tl.load(log_weight + place, mask=inside, other=0.0), HAS_ROWS)
    inside = _broadcast(inside, HAS_ROWS)
    return tl.where(inside, value, float("-inf")), tl.where(inside, slope, 0.0)


@triton.jit
def _broadcast(values, HAS_ROWS: tl.constexpr):
    """Return the values of columns in a shape that broadcasts over rows, if ``HAS_ROWS``."""
    if HAS_ROWS:
        return values[None, :]
    else:  # noqa: RET505 - Triton compiles what follows a return
        return values
