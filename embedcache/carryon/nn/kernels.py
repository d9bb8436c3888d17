"""What `elementwise` computes, its oracle, by one Triton kernel a direction.

Each value is read and written once, and sums are float32. Where a gradient is a sum over rows, each
program sums its own, and these sums are added up after: always in one order.

Axes: K carry-ons, N rows of one (its positions), R width, H hidden of the base, P programs of one;
S rows of a tile, B columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Values that a program has of a tensor at a time, more where a row is longer."""
PROGRAMS = 4096
"""Programs that a tensor is shared by, about: enough to keep any GPU busy."""
TILES = 4
"""Tiles that a program has, at least: sums of fewer would be many."""
COLUMNS = 128
"""VocabSubset of a gate's tile."""
EPS = torch.finfo(torch.float32).eps
"""What keeps a norm from dividing by zero, as PyTorch has it."""


def residual_norm(
    h: Tensor, more: Tensor | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do what `elementwise.residual_norm` does; the norm is of ``dtype``."""
    apply: Any = _ResidualNorm.apply  # torch leaves it untyped
    kept, normed = apply(h, more, weight, dtype)
    return kept, normed


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `elementwise.rotated` does; the values are a view of ``qkv``."""
    apply: Any = _Rotated.apply
    q, k, v = apply(qkv, cos, sin)
    return q, k, v


def gated(branch: Tensor, gate: Tensor, branch_bias: Tensor, gate_bias: Tensor) -> Tensor:
    """Return (branch + its bias) · σ(gate + its bias), (K)BTH; biases are (K)H."""
    apply: Any = _Gated.apply
    delta: Tensor = apply(branch, gate, branch_bias, gate_bias)
    return delta


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, more: Tensor | None, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the last norm's sum has none
        h = h.contiguous()
        kept = h if more is None else torch.empty_like(h)
        normed = torch.empty_like(h, dtype=dtype)
        more = None if more is None else more.contiguous()
        with torch.cuda.device_of(h):  # Triton launches on the current device
            grid, sizes = _whole_rows(h, weight)
            _norm[grid](h, more, weight, _stride(weight), kept, normed, EPS, **sizes)
        ctx.more_dtype = None if more is None else more.dtype
        ctx.save_for_backward(kept, weight)
        return kept, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        kept_slope, slope = (g if g is None else g.contiguous() for g in gradients)
        h_slope, more_slope = torch.empty_like(kept), None
        if ctx.more_dtype not in (None, kept.dtype):
            more_slope = torch.empty_like(kept, dtype=ctx.more_dtype)
        with torch.cuda.device_of(kept):
            grid, sizes = _whole_rows(kept, weight)
            sums_KPR = kept.new_empty(grid[1], grid[0], weight.shape[-1], dtype=torch.float32)
            _norm_slopes[grid](
                *(kept, weight, _stride(weight), slope, kept_slope),
                *(h_slope, more_slope, sums_KPR, EPS),
                **sizes,
            )
        if ctx.more_dtype == kept.dtype:
            more_slope = h_slope
        weight_slope = sums_KPR.sum(dim=1).view(weight.shape).to(weight.dtype)
        return h_slope, more_slope, weight_slope, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.contiguous(), sin.contiguous()
        q_from, k_from, v = qkv.contiguous().unbind(-3)
        q, k = v.new_empty(v.shape), v.new_empty(v.shape)
        _turn((q_from, k_from, None), (q, k, None), cos, sin, back=False)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *lead, N, D = gradients[0].shape
        slope = gradients[0].new_empty(*lead, 3, N, D)
        given = tuple(gradient.contiguous() for gradient in gradients)
        _turn(given, slope.unbind(-3), *ctx.saved_tensors, back=True)
        return slope, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, gate: Tensor, branch_bias: Tensor, gate_bias: Tensor
    ) -> Tensor:
        branch, gate = branch.contiguous(), gate.contiguous()
        biases = branch_bias, _stride(branch_bias), gate_bias, _stride(gate_bias)
        delta = torch.empty_like(branch)
        with torch.cuda.device_of(branch):
            grid, sizes = _some_columns(branch, branch_bias)
            _gate[grid](branch, gate, *biases, delta, **sizes)
        ctx.save_for_backward(branch, gate, branch_bias, gate_bias)
        return delta

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, branch_bias, gate_bias = ctx.saved_tensors
        biases = branch_bias, _stride(branch_bias), gate_bias, _stride(gate_bias)
        slopes = torch.empty_like(branch), torch.empty_like(gate)
        with torch.cuda.device_of(branch):
            grid, sizes = _some_columns(branch, branch_bias)
            sums = (grid[2], grid[0], branch_bias.shape[-1])
            sums_KPH = [branch.new_empty(sums, dtype=torch.float32) for _ in biases[::2]]
            _gate_slopes[grid](
                branch, gate, *biases, gradients[0].contiguous(), *slopes, *sums_KPH, **sizes
            )
        bias_slopes = (
            sums.sum(dim=1).view(bias.shape).to(bias.dtype)
            for sums, bias in zip(sums_KPH, biases[::2], strict=True)
        )
        return *slopes, *bias_slopes


def _turn(
    given: tuple[Tensor | None, ...],
    made: tuple[Tensor | None, ...],
    cos: Tensor,
    sin: Tensor,
    *,
    back: bool,
) -> None:
    """Turn heads of queries and keys by their positions' angles, or back; copy values, if any.

    What is given, or going back what is made, lies packed: all three of a position side by side.
    """
    q = given[0]
    assert q is not None
    N, D = q.shape[-2:]
    strides = (N * D, 3 * N * D) if back else (3 * N * D, N * D)
    pairs = triton.next_power_of_2(D // 2)
    heads, rows = q.numel() // D, max(1, TILE // pairs)
    with torch.cuda.device_of(q):
        _turned[(triton.cdiv(heads, rows),)](
            *(*given, strides[0], *made, strides[1]),
            *(cos, sin, cos.numel() // (D // 2), heads),
            BACK=back, HEADS=N, HALF=D // 2, ROWS=rows, PAIRS=pairs,
        )  # fmt: skip


def _whole_rows(x: Tensor, weight: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return a grid [P, K] of programs that have whole rows, and the sizes that they take."""
    R = weight.shape[-1]
    K = weight.numel() // R
    N, block = x.numel() // (K * R), triton.next_power_of_2(R)
    rows = max(1, TILE // block)
    sizes = {"rows": N, "width": R, "ROWS": rows, "BLOCK": block}
    return (_programs(N, rows, K), K), sizes | {"num_warps": min(16, max(4, block // 512))}


def _some_columns(x: Tensor, bias: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return a grid [P, columns, K] of programs that have rows of some columns, and their sizes."""
    H = bias.shape[-1]
    K = bias.numel() // H
    N, block = x.numel() // (K * H), min(COLUMNS, triton.next_power_of_2(H))
    rows, columns = TILE // block, triton.cdiv(H, block)
    sizes = {"rows": N, "width": H, "ROWS": rows, "BLOCK": block}
    return (_programs(N, rows, K * columns), columns, K), sizes


def _programs(rows: int, tile: int, beside: int) -> int:
    """Return how many programs share so many rows."""
    return min(triton.cdiv(PROGRAMS, beside), triton.cdiv(rows, TILES * tile))


def _stride(weight: Tensor) -> int:
    """Return how far apart the weights of two carry-ons are; those of one lie close."""
    return weight.stride(0)


@triton.jit
def _norm(
    h, more, weight, weight_stride, kept, normed, eps, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_B = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    weight_B = _weights(weight, k, weight_stride, column_B, width)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_B, width, ROWS)
        value = _values(h, place, inside)
        if more is not None:
            sum_SB = (value + _values(more, place, inside)).to(kept.dtype.element_ty)
            tl.store(kept + place, sum_SB, mask=inside)
            value = sum_SB.to(tl.float32)  # the gradient is taken of what was kept
        scale_S = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
        _store(normed, place, inside, value * scale_S[:, None] * weight_B[None, :])


@triton.jit
def _norm_slopes(
    kept, weight, weight_stride, slopes, kept_slopes, h_slopes, more_slopes, sums, eps, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_B = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    weight_B = _weights(weight, k, weight_stride, column_B, width)
    sum_B = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_B, width, ROWS)
        unit, slope = _values(kept, place, inside), _values(slopes, place, inside)
        scale_S = 1.0 / tl.sqrt(tl.sum(unit * unit, axis=1) / width + eps)
        unit *= scale_S[:, None]
        sum_B += tl.sum(slope * unit, axis=0)
        slope *= weight_B[None, :]
        along_S = tl.sum(slope * unit, axis=1) / width
        slope = (slope - unit * along_S[:, None]) * scale_S[:, None]
        if kept_slopes is not None:
            slope += _values(kept_slopes, place, inside)
        _store(h_slopes, place, inside, slope)
        if more_slopes is not None:
            _store(more_slopes, place, inside, slope)
    own = (k * tl.num_programs(0) + tl.program_id(0)) * width
    tl.store(sums + own + column_B, sum_B, mask=column_B < width)


@triton.jit
def _turned(
    q, k, v, stride, q_to, k_to, v_to, stride_to, cos, sin, angles, rows,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row_S, pair_B = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAIRS)[None, :]
    inside = (row_S < rows)[:, None] & (pair_B < HALF)
    position_S = row_S // HEADS  # a row is a head of a position
    # A stack's carry-ons may share their positions.
    angle = (position_S % angles).to(tl.int64)[:, None] * HALF + pair_B
    cosine, sine = _values(cos, angle, inside), _values(sin, angle, inside)
    if BACK:
        sine = -sine
    position = position_S.to(tl.int64)[:, None]
    head = (row_S % HEADS)[:, None] * (2 * HALF) + pair_B
    place, place_to = position * stride + head, position * stride_to + head
    first, second = _values(q, place, inside), _values(q, place + HALF, inside)
    _store(q_to, place_to, inside, first * cosine - second * sine)
    _store(q_to, place_to + HALF, inside, second * cosine + first * sine)
    first, second = _values(k, place, inside), _values(k, place + HALF, inside)
    _store(k_to, place_to, inside, first * cosine - second * sine)
    _store(k_to, place_to + HALF, inside, second * cosine + first * sine)
    if v is not None:
        _store(v_to, place_to, inside, _values(v, place, inside))
        _store(v_to, place_to + HALF, inside, _values(v, place + HALF, inside))


@triton.jit
def _gate(
    branch, gate, branch_bias, branch_stride, gate_bias, gate_stride, delta, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_B = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    branch_bias_B = _weights(branch_bias, k, branch_stride, column_B, width)
    gate_bias_B = _weights(gate_bias, k, gate_stride, column_B, width)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_B, width, ROWS)
        value = _values(branch, place, inside) + branch_bias_B[None, :]
        logit = _values(gate, place, inside) + gate_bias_B[None, :]
        _store(delta, place, inside, value / (1.0 + tl.exp(-logit)))


@triton.jit
def _gate_slopes(
    branch, gate, branch_bias, branch_stride, gate_bias, gate_stride, slopes, branch_slopes,
    gate_slopes, branch_sums, gate_sums, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_B = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    branch_bias_B = _weights(branch_bias, k, branch_stride, column_B, width)
    gate_bias_B = _weights(gate_bias, k, gate_stride, column_B, width)
    branch_sum_B, gate_sum_B = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_B, width, ROWS)
        value = _values(branch, place, inside) + branch_bias_B[None, :]
        logit = _values(gate, place, inside) + gate_bias_B[None, :]
        open_SB = 1.0 / (1.0 + tl.exp(-logit))
        slope = _values(slopes, place, inside) * open_SB
        gate_slope = slope * value * (1.0 - open_SB)
        _store(branch_slopes, place, inside, slope)
        _store(gate_slopes, place, inside, gate_slope)
        branch_sum_B += tl.sum(slope, axis=0)
        gate_sum_B += tl.sum(gate_slope, axis=0)
    own = (k * tl.num_programs(0) + tl.program_id(0)) * width + column_B
    tl.store(branch_sums + own, branch_sum_B, mask=column_B < width)
    tl.store(gate_sums + own, gate_sum_B, mask=column_B < width)


@triton.jit
def _tile(k, first, rows, column_B, width, ROWS: tl.constexpr):
    """Return the places of rows from ``first`` on in a tensor [K, rows, width], and which exist."""
    row_S = first + tl.arange(0, ROWS)
    place_SB = (k * rows + row_S)[:, None] * width + column_B[None, :]
    return place_SB, (row_S < rows)[:, None] & (column_B < width)[None, :]


@triton.jit
def _weights(weight, k, stride, column_B, width):
    return tl.load(weight + k * stride + column_B, mask=column_B < width, other=0.0).to(tl.float32)


@triton.jit
def _values(x, place, inside):
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, place, inside, value):
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)
