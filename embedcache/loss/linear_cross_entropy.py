"""Linear cross-entropy: the loss of embeddings through a frozen head, and its gradient.

With logits l = cap(scale · (x·w + b)) and p = softmax(l), the gradient of the label's -log p is
scale · Σ (p_c - [c = label]) cap'(l_c) w_c. The sum over the other columns is kept unnormalised, as
in FlashAttention's forward pass (arXiv 2205.14135): when a tile raises the peak, the sum is
rescaled. The label's own term is added at the end, from its loss in full precision: p - 1 is small
where the model is right, and would be lost to rounding beside the other terms.

Axes: N positions, n positions of a chunk, V vocabulary, C columns of the softmax, H hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.device import has_triton
from embedcache.errors import UsageError, nearest
from embedcache.loss.chunks import Chunks, plan_chunks
from embedcache.loss.one_tile import one_tile_cross_entropy
from embedcache.loss.online_softmax import OnlineSoftmax, combine, update
from embedcache.loss.tiles import LabelRows, VocabSubset, tiles
from embedcache.units import round_up

IMPLS = ("auto", "torch", "triton")
ROW_ALIGNMENT = 64
"""On a GPU the rows of logits are this many elements apart, or a multiple of it."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that one implementation consists of.

    Attributes:
        update: as `embedcache.loss.online_softmax.update`.
        combine: as `embedcache.loss.online_softmax.combine`.
        fused: the product and `update` in one, for a tile that holds all columns; None if it does
            not apply.
    """

    update: Callable[..., Tensor]
    combine: Callable[..., None]
    fused: Callable[..., None] | None = None


TORCH = Kernels(update, combine)


def linear_cross_entropy(
    x_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    subset: VocabSubset | None = None,
    impl: str = "auto",
    chunks: Chunks | None = None,
) -> Tensor:
    """Return the cross-entropy of each position through a frozen head, [N], in nats.

    The result is float32, or float64 for a float64 head; it is NaN where an embedding is not finite
    or a target is outside the columns. Only ``x_NH`` takes a gradient. Logits have the head's
    dtype, whatever the dtype of ``x_NH`` and autocast are: bfloat16 logits are what the base itself
    computes, at half the memory traffic. Everything after them is float32.

    A head in host memory is streamed to the device of ``x_NH`` tile by tile, once a call; copies
    overlap products if the memory is pinned (`Tensor.pin_memory`).

    Args:
        x_NH: embeddings after the carry-on, of the predicted positions.
        head: the base's head, on the device of ``x_NH`` or in host memory.
        targets_N: token ids in [0, V); with ``subset``, indices of its columns.
        subset: the columns of the softmax, made from ``head``; by default the whole vocabulary.
        impl: ``triton``, ``torch``, or ``auto``: Triton on CUDA if it is installed.
        chunks: how many logits exist at a time; by default `plan_chunks` decides.

    Raises:
        UsageError: if ``impl`` is unknown, or ``triton`` cannot run.
    """
    if subset is None:
        subset = VocabSubset.whole(head)
    weight_CH = subset.weight_CH
    x_NH = x_NH.to(weight_CH.dtype)
    if not torch.is_grad_enabled():
        x_NH = x_NH.detach()  # otherwise a gradient would be computed that nobody uses
    if chunks is None:
        streamed = weight_CH.device != x_NH.device
        chunks = plan_chunks(
            len(x_NH),
            len(subset),
            weight_CH.dtype,
            x_NH.device,
            streamed_hidden=weight_CH.shape[1] if streamed else 0,
        )
    apply: Any = _LinearCrossEntropy.apply  # torch leaves it untyped
    loss_N: Tensor = apply(x_NH, subset, targets_N, chunks, _kernels(impl, x_NH, subset))
    return loss_N


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is computed in the forward pass; the backward pass multiplies it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        subset: VocabSubset,
        targets_N: Tensor,
        chunks: Chunks,
        kernels: Kernels,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        one_tile = x_NH.is_cpu and subset.softcap is None and chunks.columns >= len(subset)
        if one_tile and kernels is TORCH:
            loss_N, gradient_NH = one_tile_cross_entropy(
                x_NH, subset, targets_N, chunks, needs_gradient=needs_gradient
            )
        else:
            loss_N, gradient_NH = _tiled_cross_entropy(
                x_NH, subset, targets_N, chunks, kernels, needs_gradient=needs_gradient
            )
        if gradient_NH is not None:
            ctx.combine = kernels.combine
            ctx.save_for_backward(gradient_NH)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        x_gradient_NH = torch.empty_like(gradient_NH)
        ctx.combine(gradient_NH, gradients[0], out=x_gradient_NH)
        return x_gradient_NH, None, None, None, None


def _tiled_cross_entropy(
    x_NH: Tensor,
    subset: VocabSubset,
    targets_N: Tensor,
    chunks: Chunks,
    kernels: Kernels,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return loss_N, and its gradient_NH if needed, by an online softmax over tiles."""
    device, N = x_NH.device, len(x_NH)
    dtype = torch.promote_types(x_NH.dtype, torch.float32)
    positions, columns = chunks.of_rows(N), chunks.of_columns(len(subset))
    softmax = OnlineSoftmax.empty(N, dtype, device)
    buffer = x_NH.new_empty(
        min(N, chunks.rows) * _row_stride(min(len(subset), chunks.columns), device)
    )
    one_tile = len(columns) == 1
    sum_NH = None
    if needs_gradient and one_tile:
        sum_NH = x_NH.new_empty(x_NH.shape)
    elif needs_gradient:  # in float32: each tile's product would round the sum otherwise
        sum_NH = x_NH.new_zeros(x_NH.shape, dtype=dtype)
    labels = LabelRows(subset, targets_N, device)
    fused = kernels.fused if one_tile else None
    with torch.autocast(device.type, enabled=False):
        for tile in tiles(subset, columns, device):
            weight_CH = tile.subset.weight_CH
            for chunk in positions:
                logits_nC = _matrix(buffer, chunk.stop - chunk.start, len(weight_CH))
                state = tile, targets_N[chunk], softmax[chunk]
                if fused is not None:
                    fused(x_NH[chunk], *state, out=logits_nC, needs_gradient=needs_gradient)
                else:
                    torch.mm(x_NH[chunk], weight_CH.T, out=logits_nC)
                    rescale_n = kernels.update(logits_nC, *state, needs_gradient=needs_gradient)
                if sum_NH is not None and one_tile:
                    torch.mm(logits_nC, weight_CH, out=sum_NH[chunk])
                elif sum_NH is not None:
                    sum_NH[chunk].mul_(rescale_n[:, None]).add_(logits_nC @ weight_CH)
            if needs_gradient:
                labels.copy_from(tile)
    del buffer
    loss_N = softmax.cross_entropy()
    if subset.softcap is not None:
        # tanh would hide an infinite embedding.
        loss_N.masked_fill_(~x_NH.isfinite().all(dim=1), torch.nan)
    if sum_NH is None:
        return loss_N, None
    gradient_NH = x_NH.new_empty(x_NH.shape) if sum_NH.dtype != x_NH.dtype else sum_NH
    for chunk in positions:
        # (p - 1) · d(logit) / d(product) at the label
        label_n = torch.expm1(-loss_N[chunk]) * subset.scale
        if subset.softcap is not None:
            capped_n = softmax.label_N[chunk] - labels.log_weight(chunk)
            label_n *= 1 - (capped_n / subset.softcap).square()
        kernels.combine(
            sum_NH[chunk],
            subset.scale / softmax.total_N[chunk],
            (*labels.source(chunk), label_n),
            out=gradient_NH[chunk],
        )
    return loss_N, gradient_NH


def _row_stride(columns: int, device: torch.device) -> int:
    """Return the distance of two rows of logits: on a GPU each row starts on a cache line.

    On a CPU rows are contiguous: oneDNN's bfloat16 products read what lies between rows.
    """
    return columns if device.type == "cpu" else round_up(columns, ROW_ALIGNMENT)


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """Return the start of a flat buffer as a matrix [rows, columns]."""
    stride = _row_stride(columns, buffer.device)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def _kernels(impl: str, x_NH: Tensor, subset: VocabSubset) -> Kernels:
    """Return the functions of an implementation; see `linear_cross_entropy`."""
    if impl not in IMPLS:
        raise UsageError(
            f"expected `impl=` to be one of {', '.join(IMPLS)}, found '{impl}'."
            f"{nearest(impl, IMPLS)}"
        )
    possible = x_NH.dtype != torch.float64 and _triton_runs_on(x_NH.device.type)
    if impl == "triton" and not possible:
        raise UsageError(
            "expected Triton, a CUDA device and a dtype below float64 for `impl=` 'triton', found "
            f"{x_NH.dtype} on {x_NH.device} with Triton "
            f"{'installed' if has_triton() else 'missing'}. Use `impl=` 'auto'."
        )
    if impl == "torch" or not possible or (impl == "auto" and x_NH.device.type != "cuda"):
        return TORCH
    from embedcache.loss.triton import fused, kernels

    return Kernels(
        kernels.update,
        kernels.combine,
        fused.fused_dlogits if fused.applies(x_NH, subset) else None,
    )


def _triton_runs_on(device_type: str) -> bool:
    """Return whether Triton is installed, and compiles for the device or is interpreted."""
    if not has_triton():
        return False
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
