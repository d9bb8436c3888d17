"""The product with the head and `update` in one kernel: logits are never written.

`embedcache.loss.online_softmax.update` reads and writes all logits once more. Here they go from the
accumulators of the matrix unit, in float32, through exp into the buffer as dlogits. These are
relative to the label's logit, which a product of two rows gives first; so the label's term of the
total is 1. If the total exceeds what exp and sums hold, the position's logits are far above its
label's: `_total` then computes the position again, relative to its largest logit, without the host.

Written for NVIDIA's Hopper: tiles are loaded and stored by its tensor memory accelerator. For wide
embeddings a library's product is faster, and the product is most of the time.

Axes: N positions, C columns, H hidden; lower case: a block of the axis.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from embedcache.loss.online_softmax import OnlineSoftmax
from embedcache.loss.tiles import Tile, VocabSubset
from embedcache.loss.triton.kernels import logits_of

MAX_HIDDEN = 2048
"""Largest width of embeddings for which this is faster than a library's product and `update`."""
BLOCK_N, BLOCK_C, BLOCK_H, GROUP = 128, 256, 64, 8
"""Positions and columns of a tile of the product, hidden components that are loaded at a time, and
tiles of positions that are computed one after the other with the same columns."""
MAX_TOTAL = math.exp(60)
"""Positions with a larger total are computed again: float32 and bfloat16 hold e^88, and sums of
many e^60."""
ALIGNMENT = 16
"""Matrices and their rows start at multiples of this many bytes."""


def applies(x_NH: Tensor, subset: VocabSubset) -> bool:
    """Return whether `fused_dlogits` can compute this loss, and is faster than `update`."""
    if x_NH.shape[1] > MAX_HIDDEN or not all(map(_aligned, (x_NH, subset.weight_CH))):
        return False
    if x_NH.device.type != "cuda":  # interpreted: in float32, in a buffer without padding
        return x_NH.dtype == torch.float32 and len(subset) % 4 == 0
    return x_NH.dtype == torch.bfloat16 and _is_hopper(x_NH.device)


def _aligned(matrix: Tensor) -> bool:
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and pitch % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: any number
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_dlogits(
    x_NH: Tensor,
    tile: Tile,
    targets_N: Tensor,
    softmax: OnlineSoftmax,
    *,
    out: Tensor,
    needs_gradient: bool,
) -> None:
    """Compute the softmax of a single tile, from embeddings.

    Args:
        x_NH: the embeddings.
        tile: all columns of the softmax.
        targets_N: index of each label among the columns.
        softmax: the empty softmax; set to that of the tile.
        out: where dlogits are written, as by `embedcache.loss.online_softmax.update`, [N, C];
            unchanged without ``needs_gradient``.
        needs_gradient: whether dlogits are computed.
    """
    rows, hidden = x_NH.shape
    subset = tile.subset
    weight_CH, softcap = subset.weight_CH, subset.softcap
    columns, device = len(weight_CH), x_NH.device
    if not rows:
        return
    # The part of each position's total in each tile of columns.
    partials = torch.empty(triton.cdiv(columns, BLOCK_C), rows, device=device)
    count = triton.cdiv(rows, BLOCK_N) * len(partials)
    inputs = (x_NH, x_NH.stride(0), weight_CH, weight_CH.stride(0), hidden)
    cap = 1.0 if softcap is None else softcap
    head = (subset.bias_C, subset.log_weight_C, columns, subset.scale, cap)
    with torch.cuda.device_of(x_NH):  # Triton launches on the current device
        _label[(rows,)](
            *inputs,
            targets_N,
            softmax.peak_N,
            softmax.label_N,
            *head,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_H=min(1024, triton.next_power_of_2(hidden)),
        )
        processors = min(count, _processors(device))
        _dlogits[(processors,)](
            TensorDescriptor.from_tensor(x_NH, [BLOCK_N, BLOCK_H]),
            TensorDescriptor.from_tensor(weight_CH, [BLOCK_C, BLOCK_H]),
            TensorDescriptor.from_tensor(out, [BLOCK_N, BLOCK_C // 2]),
            targets_N,
            softmax.peak_N,
            partials,
            rows,
            *head,
            HIDDEN=hidden,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_H=BLOCK_H,
            GROUP=GROUP,
            PROCESSORS=processors,
            num_warps=8,
            num_stages=3,
        )
        _total[(rows,)](
            *inputs,
            out,
            out.stride(0),
            partials,
            rows,
            targets_N,
            softmax.peak_N,
            softmax.total_N,
            *head,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            MAX_TOTAL=MAX_TOTAL,
            TILES=len(partials),
            BLOCK_TILES=triton.next_power_of_2(len(partials)),
            BLOCK_C=64,
            BLOCK_H=64,
        )


@triton.jit
def _label(
    x,
    x_stride,
    weight,
    weight_stride,
    hidden,
    targets,
    peaks,
    labels,
    bias,
    log_weight,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Set a position's peak to its label's logit; both are NaN if the label is not a column."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(targets + row)
    here = (label >= 0) & (label < columns)
    sum_h = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, hidden, BLOCK_H):
        place_h = first + tl.arange(0, BLOCK_H)
        inside_h = place_h < hidden
        x_h = tl.load(x + row * x_stride + place_h, mask=inside_h, other=0.0)
        at = weight + label.to(tl.int64) * weight_stride + place_h
        weight_h = tl.load(at, mask=inside_h & here, other=0.0)
        sum_h += x_h.to(tl.float32) * weight_h.to(tl.float32)
    value, _ = logits_of(
        tl.sum(sum_h, axis=0), label, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
    )
    value = tl.where(here, value, float("nan"))
    tl.store(labels + row, value)
    # A label of -inf (a banned token) must not give inf - inf; other logits are far above -1e30.
    tl.store(peaks + row, tl.where(value < -1e30, -1e30, value))


@triton.jit
def _dlogits(
    x,
    weight,
    out,
    targets,
    peaks,
    partials,
    rows,
    bias,
    log_weight,
    columns,
    scale,
    softcap,
    HIDDEN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    PROCESSORS: tl.constexpr,
):
    """Write dlogits tile by tile, and each tile's part of its positions' totals."""
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_C)
    together = GROUP * tiles_across
    for number in tl.range(tl.program_id(0), tiles_down * tiles_across, PROCESSORS, flatten=True):
        first = number // together * GROUP
        high = tl.minimum(tiles_down - first, GROUP)
        down, across = first + number % together % high, number % together // high
        product_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first_h in range(0, HIDDEN, BLOCK_H):
            x_nh = x.load([down * BLOCK_N, first_h])
            weight_ch = weight.load([across * BLOCK_C, first_h])
            product_nc = tl.dot(x_nh, weight_ch.T, product_nc)
        row_n = down * BLOCK_N + tl.arange(0, BLOCK_N)
        place_c = across * BLOCK_C + tl.arange(0, BLOCK_C)
        inside_n = row_n < rows
        label_n1 = tl.load(targets + row_n, mask=inside_n, other=-1)[:, None]
        peak_n1 = tl.load(peaks + row_n, mask=inside_n, other=0.0)[:, None]
        value_nc, slope_nc = logits_of(
            product_nc, place_c, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP, True
        )
        # The label's term is 1 and is added by `_total`.
        exp_nc = tl.where(place_c[None, :] == label_n1, 0.0, tl.exp(value_nc - peak_n1))
        at = partials + across.to(tl.int64) * rows + row_n
        tl.store(at, tl.sum(exp_nc, axis=1), mask=inside_n)
        if NEEDS_GRADIENT:
            if HAS_SOFTCAP:
                exp_nc *= slope_nc
            # In halves, which fit into shared memory beside the next loads.
            halves = tl.permute(tl.reshape(exp_nc, (BLOCK_N, 2, BLOCK_C // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([down * BLOCK_N, across * BLOCK_C], left.to(out.dtype))
            out.store([down * BLOCK_N, across * BLOCK_C + BLOCK_C // 2], right.to(out.dtype))


@triton.jit
def _total(
    x,
    x_stride,
    weight,
    weight_stride,
    hidden,
    out,
    out_stride,
    partials,
    rows,
    targets,
    peaks,
    totals,
    bias,
    log_weight,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    MAX_TOTAL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add up a position's total; if it is too large, compute the position again."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK_TILES)
    tile_totals = tl.load(partials + number * rows + row, mask=number < TILES, other=0.0)
    total = 1.0 + tl.sum(tile_totals, axis=0)
    if total > MAX_TOTAL:  # not for NaN: the embedding is then not finite
        x += row * x_stride
        out += row * out_stride
        label = tl.load(targets + row)
        peak_c = tl.full([BLOCK_C], -1e38, tl.float32)
        for first in range(0, columns, BLOCK_C):
            place_c = first + tl.arange(0, BLOCK_C)
            product_c = _products(
                x, weight, weight_stride, place_c, columns, hidden, BLOCK_C, BLOCK_H
            )
            value_c, _ = logits_of(
                product_c, place_c, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
            )
            peak_c = tl.maximum(peak_c, value_c)
        peak = tl.max(peak_c, axis=0)
        total_c = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, columns, BLOCK_C):
            place_c = first + tl.arange(0, BLOCK_C)
            product_c = _products(
                x, weight, weight_stride, place_c, columns, hidden, BLOCK_C, BLOCK_H
            )
            value_c, slope_c = logits_of(
                product_c, place_c, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
            )
            exp_c = tl.exp(value_c - peak)
            total_c += exp_c
            if NEEDS_GRADIENT:
                dlogit_c = tl.where(place_c == label, 0.0, slope_c * exp_c)
                dlogit_c = dlogit_c.to(out.dtype.element_ty)
                tl.store(out + place_c, dlogit_c, mask=place_c < columns)
        total = tl.sum(total_c, axis=0)
        tl.store(peaks + row, peak)
    tl.store(totals + row, total)


@triton.jit
def _products(
    x, weight, weight_stride, place_c, columns, hidden, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Return the products of one embedding with some rows of the head."""
    sum_ch = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for first in range(0, hidden, BLOCK_H):
        place_h = first + tl.arange(0, BLOCK_H)
        inside_h = place_h < hidden
        x_h = tl.load(x + place_h, mask=inside_h, other=0.0).to(tl.float32)
        at = weight + place_c.to(tl.int64)[:, None] * weight_stride + place_h[None, :]
        inside_ch = (place_c < columns)[:, None] & inside_h[None, :]
        sum_ch += tl.load(at, mask=inside_ch, other=0.0).to(tl.float32) * x_h[None, :]
    return tl.sum(sum_ch, axis=1)
