"""The operations of `elementwise`, each as one Triton kernel forward and one backward.

Each value is read and written once; sums are float32. Where a gradient is a sum over positions,
each program sums its own positions, and the programs' sums are added up in a fixed order.

Axes: K stacked carry-ons, B rows of a batch, T time, N positions (all of B and T), H hidden of the
base, R width, E heads, F width of a head. (K) stands for an axis that only a stack has. In kernels,
lower case stands for a block of an axis: n positions, r columns (of R or H), f pairs of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Values of a tensor that a program computes at a time; more if a row is longer."""
PROGRAMS = 4096
"""Approximate number of programs that share a tensor: enough to keep any GPU busy."""
TILES = 4
"""Least number of tiles of a program: with fewer tiles there would be many sums to add up."""
COLUMNS = 128
"""Columns of a tile of a gate."""
EPS = torch.finfo(torch.float32).eps
"""Added to the mean square in a norm, as in PyTorch."""


def residual_norm(
    h: Tensor, more: Tensor | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute `elementwise.residual_norm`; the norm has ``dtype``."""
    apply: Any = _ResidualNorm.apply  # torch leaves it untyped
    kept, normed = apply(h, more, weight, dtype)
    return kept, normed


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `elementwise.rotated`; the values are a view of ``qkv``."""
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
        ctx.set_materialize_grads(False)  # the sum before the last norm has no gradient
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
        grad_kept, grad = (g if g is None else g.contiguous() for g in gradients)
        grad_h, grad_more = torch.empty_like(kept), None
        if ctx.more_dtype not in (None, kept.dtype):
            grad_more = torch.empty_like(kept, dtype=ctx.more_dtype)
        with torch.cuda.device_of(kept):
            grid, sizes = _whole_rows(kept, weight)
            sums = kept.new_empty(grid[1], grid[0], weight.shape[-1], dtype=torch.float32)
            _norm_backward[grid](
                *(kept, weight, _stride(weight), grad, grad_kept),
                *(grad_h, grad_more, sums, EPS),
                **sizes,
            )
        if ctx.more_dtype == kept.dtype:
            grad_more = grad_h
        grad_weight = sums.sum(dim=1).view(weight.shape).to(weight.dtype)
        return grad_h, grad_more, grad_weight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.contiguous(), sin.contiguous()
        q_from, k_from, v = qkv.contiguous().unbind(-3)
        q, k = v.new_empty(v.shape), v.new_empty(v.shape)
        _launch_rotate((q_from, k_from, None), (q, k, None), cos, sin, back=False)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *lead, E, F = gradients[0].shape
        grad = gradients[0].new_empty(*lead, 3, E, F)
        given = tuple(gradient.contiguous() for gradient in gradients)
        _launch_rotate(given, grad.unbind(-3), *ctx.saved_tensors, back=True)
        return grad, None, None


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
        grads = torch.empty_like(branch), torch.empty_like(gate)
        with torch.cuda.device_of(branch):
            grid, sizes = _some_columns(branch, branch_bias)
            # Each program's sums for the gradients of both biases.
            sums = branch.new_empty(2, grid[2], grid[0], branch_bias.shape[-1], dtype=torch.float32)
            _gate_backward[grid](
                branch, gate, *biases, gradients[0].contiguous(), *grads, *sums, **sizes
            )
        grad_biases = (
            found.sum(dim=1).view(bias.shape).to(bias.dtype)
            for found, bias in zip(sums, (branch_bias, gate_bias), strict=True)
        )
        return *grads, *grad_biases


def _launch_rotate(
    given: tuple[Tensor | None, ...],
    made: tuple[Tensor | None, ...],
    cos: Tensor,
    sin: Tensor,
    *,
    back: bool,
) -> None:
    """Rotate heads of queries and keys by their positions' angles, or back; copy values, if any.

    The inputs, or with ``back`` the outputs, are packed: queries, keys and values of a position lie
    side by side.
    """
    q = given[0]
    assert q is not None
    E, F = q.shape[-2:]
    strides = (E * F, 3 * E * F) if back else (3 * E * F, E * F)
    pairs = triton.next_power_of_2(F // 2)
    heads, rows = q.numel() // F, max(1, TILE // pairs)
    with torch.cuda.device_of(q):
        _rotate[(triton.cdiv(heads, rows),)](
            *(*given, strides[0], *made, strides[1]),
            *(cos, sin, cos.numel() // (F // 2), heads),
            BACK=back, HEADS=E, HALF=F // 2, ROWS=rows, PAIRS=pairs,
        )  # fmt: skip


def _whole_rows(x: Tensor, weight: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return a grid [programs, K] of programs that compute whole rows, and their sizes."""
    R = weight.shape[-1]
    K = weight.numel() // R
    N, block = x.numel() // (K * R), triton.next_power_of_2(R)
    rows = max(1, TILE // block)
    sizes = {"rows": N, "width": R, "ROWS": rows, "BLOCK": block}
    return (_programs(N, rows, K), K), sizes | {"num_warps": min(16, max(4, block // 512))}


def _some_columns(x: Tensor, bias: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return a grid [programs, columns, K] of programs that have some columns, and their sizes."""
    H = bias.shape[-1]
    K = bias.numel() // H
    N, block = x.numel() // (K * H), min(COLUMNS, triton.next_power_of_2(H))
    rows, columns = TILE // block, triton.cdiv(H, block)
    sizes = {"rows": N, "width": H, "ROWS": rows, "BLOCK": block}
    return (_programs(N, rows, K * columns), columns, K), sizes


def _programs(rows: int, tile: int, beside: int) -> int:
    """Return the number of programs that share ``rows`` rows."""
    return min(triton.cdiv(PROGRAMS, beside), triton.cdiv(rows, TILES * tile))


def _stride(weight: Tensor) -> int:
    """Return the stride between carry-ons' weights; those of one carry-on are contiguous."""
    return weight.stride(0)


@triton.jit
def _norm(
    h, more, weight, weight_stride, kept, normed, eps, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_r = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    weight_r = _weights(weight, k, weight_stride, column_r, width)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_r, width, ROWS)
        value = _values(h, place, inside)
        if more is not None:
            sum_nr = (value + _values(more, place, inside)).to(kept.dtype.element_ty)
            tl.store(kept + place, sum_nr, mask=inside)
            value = sum_nr.to(tl.float32)  # the backward pass reads the rounded sum
        scale_n = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
        _store(normed, place, inside, value * scale_n[:, None] * weight_r[None, :])


@triton.jit
def _norm_backward(
    kept, weight, weight_stride, grads, grad_kept, grad_h, grad_more, sums, eps, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_r = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    weight_r = _weights(weight, k, weight_stride, column_r, width)
    sum_r = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_r, width, ROWS)
        unit, grad = _values(kept, place, inside), _values(grads, place, inside)
        scale_n = 1.0 / tl.sqrt(tl.sum(unit * unit, axis=1) / width + eps)
        unit *= scale_n[:, None]
        sum_r += tl.sum(grad * unit, axis=0)
        grad *= weight_r[None, :]
        projection_n = tl.sum(grad * unit, axis=1) / width
        grad = (grad - unit * projection_n[:, None]) * scale_n[:, None]
        if grad_kept is not None:
            grad += _values(grad_kept, place, inside)
        _store(grad_h, place, inside, grad)
        if grad_more is not None:
            _store(grad_more, place, inside, grad)
    own = (k * tl.num_programs(0) + tl.program_id(0)) * width
    tl.store(sums + own + column_r, sum_r, mask=column_r < width)


@triton.jit
def _rotate(
    q, k, v, stride, q_to, k_to, v_to, stride_to, cos, sin, angles, rows,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row_n, pair_f = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAIRS)[None, :]
    inside = (row_n < rows)[:, None] & (pair_f < HALF)
    position_n = row_n // HEADS  # a row is a head of a position
    # A stack's carry-ons may share their positions.
    angle = (position_n % angles).to(tl.int64)[:, None] * HALF + pair_f
    cosine, sine = _values(cos, angle, inside), _values(sin, angle, inside)
    if BACK:
        sine = -sine
    position = position_n.to(tl.int64)[:, None]
    head = (row_n % HEADS)[:, None] * (2 * HALF) + pair_f
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
    k, column_r = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    branch_bias_r = _weights(branch_bias, k, branch_stride, column_r, width)
    gate_bias_r = _weights(gate_bias, k, gate_stride, column_r, width)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_r, width, ROWS)
        value = _values(branch, place, inside) + branch_bias_r[None, :]
        logit = _values(gate, place, inside) + gate_bias_r[None, :]
        _store(delta, place, inside, value / (1.0 + tl.exp(-logit)))


@triton.jit
def _gate_backward(
    branch, gate, branch_bias, branch_stride, gate_bias, gate_stride, grads, grad_branch,
    grad_gates, branch_sums, gate_sums, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, column_r = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    branch_bias_r = _weights(branch_bias, k, branch_stride, column_r, width)
    gate_bias_r = _weights(gate_bias, k, gate_stride, column_r, width)
    branch_sum_r, gate_sum_r = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        place, inside = _tile(k, first, rows, column_r, width, ROWS)
        value = _values(branch, place, inside) + branch_bias_r[None, :]
        logit = _values(gate, place, inside) + gate_bias_r[None, :]
        open_nr = 1.0 / (1.0 + tl.exp(-logit))
        grad = _values(grads, place, inside) * open_nr
        grad_gate = grad * value * (1.0 - open_nr)
        _store(grad_branch, place, inside, grad)
        _store(grad_gates, place, inside, grad_gate)
        branch_sum_r += tl.sum(grad, axis=0)
        gate_sum_r += tl.sum(grad_gate, axis=0)
    own = (k * tl.num_programs(0) + tl.program_id(0)) * width + column_r
    tl.store(branch_sums + own, branch_sum_r, mask=column_r < width)
    tl.store(gate_sums + own, gate_sum_r, mask=column_r < width)


@triton.jit
def _tile(k, first, rows, column_r, width, ROWS: tl.constexpr):
    """Return offsets of rows from ``first`` on in a tensor [K, rows, width], and which exist."""
    row_n = first + tl.arange(0, ROWS)
    place_nr = (k * rows + row_n)[:, None] * width + column_r[None, :]
    return place_nr, (row_n < rows)[:, None] & (column_r < width)[None, :]


@triton.jit
def _weights(weight, k, stride, column_r, width):
    return tl.load(weight + k * stride + column_r, mask=column_r < width, other=0.0).to(tl.float32)


@triton.jit
def _values(x, place, inside):
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, place, inside, value):
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)
