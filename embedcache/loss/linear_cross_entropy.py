"""The cross-entropy of any columns of a frozen head, and its gradient, tile by tile.

With logits l = cap(scale · (x·w + b)) and p = softmax(l), the gradient of the label's -log p is
scale · Σ (p_c - [c = label]) cap'(l_c) w_c. The sum over the other columns is kept without its
divisor, as in FlashAttention's forward pass (arXiv 2205.14135): when a tile raises the peak, what
was summed shrinks. The label's own term is added at the end, from its loss in full precision:
beside the others it would lose p - 1, which is small where the model is right, to rounding.

Axes: N positions, R positions of a chunk, C columns, H hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.device import has_triton
from embedcache.errors import UsageError, nearest
from embedcache.loss.chunks import Chunks, plan_chunks
from embedcache.loss.labels import LabelRows
from embedcache.loss.one_tile import whole
from embedcache.loss.online_softmax import Running
from embedcache.loss.tile_update import absorb, combine
from embedcache.loss.tiles import tiles
from embedcache.loss.vocab_subset import VocabSubset
from embedcache.units import rounded_up


class Steps(NamedTuple):
    """`absorb` and `combine`, or Triton's of the same arguments; and what is faster, if it fits."""

    absorb: Callable[..., Tensor]
    combine: Callable[..., None]
    fused: Callable[..., None] | None = None
    """The product and `absorb` in one, of a tile that is the whole softmax."""
    whole: Callable[..., Tensor] | None = None
    """The loss and its own slopes, of such a tile: a product makes the gradient of them."""


IMPLS = ("auto", "torch", "triton")
ROW_ALIGNMENT = 64
"""On a GPU, rows of logits are a multiple of this many apart."""


def frozen_head_loss(
    x_NH: Tensor,
    columns: VocabSubset,
    head: Head,
    targets_N: Tensor,
    *,
    impl: str = "auto",
    chunks: Chunks | None = None,
) -> Tensor:
    """Return the cross-entropy over ``columns`` of each position, [N]; see `exact`.

    ``targets_N`` are places among the columns; of ``head`` only scale and soft-cap are used.
    """
    weight_CH = columns.weight_CH
    x_NH = x_NH.to(weight_CH.dtype)
    if not torch.is_grad_enabled():
        x_NH = x_NH.detach()  # or a gradient would be computed for nobody
    if chunks is None:
        streamed = weight_CH.device != x_NH.device
        chunks = plan_chunks(
            len(x_NH),
            len(weight_CH),
            weight_CH.dtype,
            x_NH.device,
            streamed_hidden=weight_CH.shape[1] if streamed else 0,
        )
    apply: Any = _FrozenHeadLoss.apply  # torch leaves it untyped
    steps = _implementation(impl, x_NH, columns, head)
    loss_N: Tensor = apply(x_NH, columns, head.logit_scale, head.softcap, targets_N, chunks, steps)
    return loss_N


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        columns: VocabSubset,
        scale: float,
        softcap: float | None,
        targets_N: Tensor,
        chunks: Chunks,
        steps: Steps,
    ) -> Tensor:
        ctx.combine, given = steps.combine, (x_NH, columns, scale)
        needs: bool = ctx.needs_input_grad[0]
        if steps.whole is not None and chunks.columns >= len(columns.weight_CH):
            loss_N, gradient_NH = _at_once(*given, targets_N, chunks, steps.whole, needs)
        else:
            loss_N, gradient_NH = _by_tiles(*given, softcap, targets_N, chunks, steps, needs)
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        x_gradient_NH = torch.empty_like(gradient_NH)
        ctx.combine(gradient_NH, gradients[0], out=x_gradient_NH)
        return x_gradient_NH, *(None,) * 6


def _at_once(
    x_NH: Tensor,
    columns: VocabSubset,
    scale: float,
    targets_N: Tensor,
    chunks: Chunks,
    whole: Callable[..., Tensor],
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return loss_N, and gradient_NH if it is needed, where a chunk has all columns."""
    weight_CH = columns.weight_CH
    buffer_RC = x_NH.new_empty(min(len(x_NH), chunks.rows), len(weight_CH))
    gradient_NH = torch.empty_like(x_NH) if needs_gradient else None
    loss_N = x_NH.new_empty(len(x_NH), dtype=torch.promote_types(x_NH.dtype, torch.float32))
    settings = {"scale": scale, "needs_gradient": needs_gradient}
    for chunk in chunks.of_rows(len(x_NH)):
        slopes_RC = buffer_RC[: chunk.stop - chunk.start]
        loss_N[chunk] = whole(x_NH[chunk], columns, targets_N[chunk], out=slopes_RC, **settings)
        if gradient_NH is not None:
            torch.mm(slopes_RC, weight_CH, out=gradient_NH[chunk])
    return loss_N, gradient_NH


def _by_tiles(
    x_NH: Tensor,
    columns: VocabSubset,
    scale: float,
    softcap: float | None,
    targets_N: Tensor,
    chunks: Chunks,
    steps: Steps,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return loss_N, and gradient_NH if it is needed, tile by tile."""
    device, N, C = x_NH.device, len(x_NH), len(columns.weight_CH)
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    rows, cuts = chunks.of_rows(N), chunks.of_columns(C)
    running = Running.start(N, wide, device)
    buffer = x_NH.new_empty(min(N, chunks.rows) * _width(min(C, chunks.columns), device))
    # Sums over several tiles are kept wide: each would be rounded otherwise.
    sum_NH = None
    if needs_gradient and len(cuts) == 1:
        sum_NH = x_NH.new_empty(x_NH.shape)
    elif needs_gradient:
        sum_NH = x_NH.new_zeros(x_NH.shape, dtype=wide)
    labels = LabelRows(columns, targets_N, device)
    settings = {"scale": scale, "softcap": softcap, "needs_gradient": needs_gradient}
    fused = steps.fused if len(cuts) == 1 else None
    with torch.autocast(device.type, enabled=False):
        for tile in tiles(columns, cuts, device):
            weight_CH = tile.columns.weight_CH
            for chunk in rows:
                logits_RC = _matrix(buffer, chunk.stop - chunk.start, len(weight_CH))
                seen = tile, targets_N[chunk], running.of(chunk)
                if fused is not None:
                    fused(x_NH[chunk], *seen, out=logits_RC, **settings)
                else:
                    torch.mm(x_NH[chunk], weight_CH.T, out=logits_RC)
                    shrink_R = steps.absorb(logits_RC, *seen, **settings)
                if sum_NH is not None and len(cuts) == 1:
                    torch.mm(logits_RC, weight_CH, out=sum_NH[chunk])
                elif sum_NH is not None:
                    sum_NH[chunk].mul_(shrink_R[:, None]).add_(logits_RC @ weight_CH)
            if needs_gradient:
                labels.see(tile)
    del buffer
    loss_N = running.cross_entropy()
    if softcap is not None:
        # tanh would hide an infinite embedding.
        loss_N.masked_fill_(~x_NH.isfinite().all(dim=1), torch.nan)
    if sum_NH is None:
        return loss_N, None
    gradient_NH = x_NH.new_empty(x_NH.shape) if sum_NH.dtype != x_NH.dtype else sum_NH
    for chunk in rows:
        # p - 1 at the label, times its slope
        label_R = torch.expm1(-loss_N[chunk]) * scale
        if softcap is not None:
            capped_R = running.label_R[chunk] - labels.log_weight(chunk)
            label_R *= 1 - (capped_R / softcap).square()
        steps.combine(
            sum_NH[chunk],
            scale / running.total_R[chunk],
            (*labels.source(chunk), label_R),
            out=gradient_NH[chunk],
        )
    return loss_N, gradient_NH


def _width(columns: int, device: torch.device) -> int:
    """Return how far apart rows of logits are: on a GPU each starts on a whole cache line.

    On a CPU nothing is gained, and oneDNN's bfloat16 products read what lies between rows.
    """
    if device.type == "cpu":
        return columns
    return rounded_up(columns, ROW_ALIGNMENT)


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """Return the start of a flat buffer as [rows, columns]."""
    width = _width(columns, buffer.device)
    return buffer[: rows * width].view(rows, width)[:, :columns]


def _implementation(impl: str, x_NH: Tensor, columns: VocabSubset, head: Head) -> Steps:
    """Return the functions that the loss is computed by.

    Raises ``UsageError`` for an unknown name, or ``triton`` where it cannot run.
    """
    if impl not in IMPLS:
        raise UsageError(f"impl is {', '.join(IMPLS)}; found '{impl}'.{nearest(impl, IMPLS)}")
    possible = x_NH.dtype != torch.float64 and _triton_runs_on(x_NH.device.type)
    if impl == "triton" and not possible:
        raise UsageError(
            "impl 'triton' needs Triton, a CUDA device and a dtype below float64; found "
            f"{x_NH.dtype} on {x_NH.device}, Triton "
            f"{'installed' if has_triton() else 'missing'}. Type: impl='auto'"
        )
    if impl == "torch" or not possible or (impl == "auto" and x_NH.device.type != "cuda"):
        if x_NH.is_cpu and head.softcap is None:
            return Steps(absorb, combine, whole=whole)
        return Steps(absorb, combine)
    from embedcache.loss.triton import fused, kernels

    slopes = fused.fused_slopes if fused.fits(x_NH, columns) else None
    return Steps(kernels.absorb_by_triton, kernels.combine_by_triton, fused=slopes)


def _triton_runs_on(device_type: str) -> bool:
    """Say whether Triton is installed and compiles for the device, or interprets."""
    if not has_triton():
        return False
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
