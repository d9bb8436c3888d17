"""A whole softmax at once: slopes made in the product's own epilogue, logits never written.

What `absorb` does reads and writes all logits once more; here they go from a matrix unit's
accumulators, in float32, through exp into the buffer as slopes. They are relative to the label's
logit, which a product of two rows gives beforehand: its own term of the total is 1. Where the total
comes out beyond what exp and sums hold, the position's logits lie far above its label's: `_total`
computes that one again, relative to its highest, without the host's knowing.

Written for NVIDIA's Hopper: tiles come and go by its tensor memory accelerator. For wide
embeddings the plain product is so much longer that a library's is ahead.

Axes: R positions, C columns, H hidden, T tiles of columns; in kernels M and N are a tile's
positions and columns, K a slice of hidden, B a block of columns.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from embedcache.loss.online_softmax import Running
from embedcache.loss.tiles import Tile
from embedcache.loss.triton.kernels import logits_of
from embedcache.loss.vocab_subset import VocabSubset

MOST_HIDDEN = 2048
"""Width of embeddings up to which this is faster than a library's product and `absorb`."""
POSITIONS, COLUMNS, SLICE, GROUP = 128, 256, 64, 8
"""A tile, the hidden components of it at a time, and tiles of positions that share columns."""
MOST = math.exp(60)
"""Totals beyond are computed again: float32 and bfloat16 hold e^88, and sums of many e^60."""
ALIGNMENT = 16
"""Bytes that matrices and their rows begin at multiples of."""


def fits(x_NH: Tensor, columns: VocabSubset) -> bool:
    """Say whether `fused_slopes` can do it, and pays."""
    if x_NH.shape[1] > MOST_HIDDEN or not all(map(_aligned, (x_NH, columns.weight_CH))):
        return False
    if x_NH.device.type != "cuda":  # interpreted, which is by float32, in a buffer without padding
        return x_NH.dtype == torch.float32 and len(columns.weight_CH) % 4 == 0
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
        return 4  # interpreted: any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_slopes(
    x_RH: Tensor,
    tile: Tile,
    targets_R: Tensor,
    running: Running,
    *,
    out: Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> None:
    """Do what a product and `absorb` do, for a ``tile`` that is the whole softmax.

    Slopes are written to ``out``, [R, C]; nothing is, if not ``needs_gradient``.
    """
    rows, hidden = x_RH.shape
    weight_CH = tile.columns.weight_CH
    columns, device = len(weight_CH), x_RH.device
    if not rows:
        return
    partial_TR = torch.empty(triton.cdiv(columns, COLUMNS), rows, device=device)
    count = triton.cdiv(rows, POSITIONS) * len(partial_TR)
    inputs = (x_RH, x_RH.stride(0), weight_CH, weight_CH.stride(0), hidden)
    cap = 1.0 if softcap is None else softcap
    head = (tile.columns.bias_C, tile.columns.log_weight_C, columns, scale, cap)
    with torch.cuda.device_of(x_RH):  # Triton launches on the current device
        _label[(rows,)](
            *inputs,
            targets_R,
            running.peak_R,
            running.label_R,
            *head,
            HAS_SOFTCAP=softcap is not None,
            K=min(1024, triton.next_power_of_2(hidden)),
        )
        processors = min(count, _processors(device))
        _slopes[(processors,)](
            TensorDescriptor.from_tensor(x_RH, [POSITIONS, SLICE]),
            TensorDescriptor.from_tensor(weight_CH, [COLUMNS, SLICE]),
            TensorDescriptor.from_tensor(out, [POSITIONS, COLUMNS // 2]),
            targets_R,
            running.peak_R,
            partial_TR,
            rows,
            *head,
            H=hidden,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            M=POSITIONS,
            N=COLUMNS,
            K=SLICE,
            GROUP=GROUP,
            PROCESSORS=processors,
            num_warps=8,
            num_stages=3,
        )
        _total[(rows,)](
            *inputs,
            out,
            out.stride(0),
            partial_TR,
            rows,
            targets_R,
            running.peak_R,
            running.total_R,
            *head,
            HAS_SOFTCAP=softcap is not None,
            NEEDS_GRADIENT=needs_gradient,
            MOST=MOST,
            TILES=len(partial_TR),
            T=triton.next_power_of_2(len(partial_TR)),
            B=64,
            K=64,
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
    K: tl.constexpr,
):
    """Set a position's peak to its label's logit; both are NaN where the label is no column."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(targets + row)
    here = (label >= 0) & (label < columns)
    sum_K = tl.zeros([K], tl.float32)
    for first in range(0, hidden, K):
        place_K = first + tl.arange(0, K)
        inside_K = place_K < hidden
        x_K = tl.load(x + row * x_stride + place_K, mask=inside_K, other=0.0)
        at = weight + label.to(tl.int64) * weight_stride + place_K
        weight_K = tl.load(at, mask=inside_K & here, other=0.0)
        sum_K += x_K.to(tl.float32) * weight_K.to(tl.float32)
    value, _ = logits_of(
        tl.sum(sum_K, axis=0), label, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
    )
    value = tl.where(here, value, float("nan"))
    tl.store(labels + row, value)
    # A label of -inf (a banned token) must not give inf - inf; that of others is far above.
    tl.store(peaks + row, tl.where(value < -1e30, -1e30, value))


@triton.jit
def _slopes(
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
    H: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PROCESSORS: tl.constexpr,
):
    """Write slopes tile by tile, and the share of each in its positions' totals."""
    tiles_down, tiles_across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    together = GROUP * tiles_across
    for number in tl.range(tl.program_id(0), tiles_down * tiles_across, PROCESSORS, flatten=True):
        first = number // together * GROUP
        high = tl.minimum(tiles_down - first, GROUP)
        down, across = first + number % together % high, number % together // high
        product_MN = tl.zeros([M, N], tl.float32)
        for slice in range(0, H, K):
            x_MK, weight_NK = x.load([down * M, slice]), weight.load([across * N, slice])
            product_MN = tl.dot(x_MK, weight_NK.T, product_MN)
        row_M = down * M + tl.arange(0, M)
        place_N = across * N + tl.arange(0, N)
        inside_M = row_M < rows
        label_M1 = tl.load(targets + row_M, mask=inside_M, other=-1)[:, None]
        peak_M1 = tl.load(peaks + row_M, mask=inside_M, other=0.0)[:, None]
        value_MN, slope_MN = logits_of(
            product_MN, place_N, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP, True
        )
        # The label's is 1, and added at the end.
        share_MN = tl.where(place_N[None, :] == label_M1, 0.0, tl.exp(value_MN - peak_M1))
        at = partials + across.to(tl.int64) * rows + row_M
        tl.store(at, tl.sum(share_MN, axis=1), mask=inside_M)
        if NEEDS_GRADIENT:
            if HAS_SOFTCAP:
                share_MN *= slope_MN
            # By halves, for which there is room beside the slices to come.
            halves = tl.permute(tl.reshape(share_MN, (M, 2, N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([down * M, across * N], left.to(out.dtype))
            out.store([down * M, across * N + N // 2], right.to(out.dtype))


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
    MOST: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
):
    """Add up a position's total; where it is too much, compute all of that position anew."""
    row = tl.program_id(0).to(tl.int64)
    place_T = tl.arange(0, T)
    partial_T = tl.load(partials + place_T * rows + row, mask=place_T < TILES, other=0.0)
    total = 1.0 + tl.sum(partial_T, axis=0)
    if total > MOST:  # where it is NaN, so is the embedding
        x += row * x_stride
        out += row * out_stride
        label = tl.load(targets + row)
        peak_B = tl.full([B], -1e38, tl.float32)
        for first in range(0, columns, B):
            place_B = first + tl.arange(0, B)
            product_B = _products(x, weight, weight_stride, place_B, columns, hidden, B, K)
            value_B, _ = logits_of(
                product_B, place_B, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
            )
            peak_B = tl.maximum(peak_B, value_B)
        peak = tl.max(peak_B, axis=0)
        total_B = tl.zeros([B], tl.float32)
        for first in range(0, columns, B):
            place_B = first + tl.arange(0, B)
            product_B = _products(x, weight, weight_stride, place_B, columns, hidden, B, K)
            value_B, slope_B = logits_of(
                product_B, place_B, bias, log_weight, columns, scale, softcap, HAS_SOFTCAP
            )
            share_B = tl.exp(value_B - peak)
            total_B += share_B
            if NEEDS_GRADIENT:
                slope_B = tl.where(place_B == label, 0.0, slope_B * share_B)
                slope_B = slope_B.to(out.dtype.element_ty)
                tl.store(out + place_B, slope_B, mask=place_B < columns)
        total = tl.sum(total_B, axis=0)
        tl.store(peaks + row, peak)
    tl.store(totals + row, total)


@triton.jit
def _products(x, weight, weight_stride, place_B, columns, hidden, B: tl.constexpr, K: tl.constexpr):
    """Return the products of an embedding with some rows of the head."""
    sum_BK = tl.zeros([B, K], tl.float32)
    for first in range(0, hidden, K):
        place_K = first + tl.arange(0, K)
        inside_K = place_K < hidden
        x_K = tl.load(x + place_K, mask=inside_K, other=0.0).to(tl.float32)
        at = weight + place_B.to(tl.int64)[:, None] * weight_stride + place_K[None, :]
        inside_BK = (place_B < columns)[:, None] & inside_K[None, :]
        sum_BK += tl.load(at, mask=inside_BK, other=0.0).to(tl.float32) * x_K[None, :]
    return tl.sum(sum_BK, axis=1)
