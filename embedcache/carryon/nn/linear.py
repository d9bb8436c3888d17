"""Linear layers of one carry-on or of a stack, aware of the optimiser's copies of weights.

Axes: K stacked carry-ons, B rows of a batch, T time, N tokens (all of B and T), I inputs and O
outputs of a layer. (K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.carryon.nn.elementwise import product_dtype

LOW_PRECISION_COPY = "embedcache_low_precision_copy"
"""Attribute of a stack's weight or bias: the copy of lower precision that the optimiser keeps."""
GRADIENT_BUFFER = "embedcache_gradient_buffer"
"""Attribute of a stack's weight or bias: the tensor that its gradients are added to."""


class Linear(nn.Linear):
    """A linear layer, or K of them: weight_(K)OI, bias_(K)O."""

    def forward(self, x_BTI: Tensor, *, biased: bool = True) -> Tensor:
        """Return y_(K)BTO; a stack takes x_BTI, shared by all layers, or x_KBTI.

        Without ``biased``, the bias is left out, for a caller that adds it.
        """
        weight, bias = self.weight, self.bias if biased else None
        if weight.ndim == 2:
            return F.linear(x_BTI, weight, bias)
        apply: Any = _StackedLinear.apply  # torch leaves it untyped
        y_KBTO: Tensor = apply(x_BTI, weight, bias)
        return y_KBTO


class _StackedLinear(torch.autograd.Function):
    """K linear layers, of a shared input x_BTI or of an input each, x_KBTI; returns y_KBTO.

    If the optimiser keeps a low-precision copy of the weight, the product uses it; if it keeps a
    gradient buffer, the gradient is accumulated there, by the product itself where both have one
    dtype. Otherwise both would be allocated for every product.

    Gradients of weights have the weights' layout: those of `torch.baddbmm` are transposed, and
    would be copied. On a GPU the gradient of a bias is a product as well: a sum allocates several
    times the memory of its input there.
    """

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None) -> Tensor:
        dtype, K, shape = product_dtype(x_BTI), len(weight_KOI), x_BTI.shape
        ctx.x_dtype, ctx.shape = x_BTI.dtype, shape
        ctx.weight_KOI, ctx.bias_KO = weight_KOI, bias_KO
        # One layer, or all layers of a shared input, are one product, which adds the bias as well.
        ctx.one_product = K == 1 or x_BTI.ndim == 3
        x_NI = x_BTI.to(dtype).flatten(0 if ctx.one_product else 1, -2)
        weight = _in_dtype(weight_KOI, dtype)
        bias = None if bias_KO is None else _in_dtype(bias_KO, dtype)
        if ctx.one_product:
            weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
        ctx.save_for_backward(x_NI, weight)
        if not ctx.one_product:
            if bias is None:
                y_KNO = torch.bmm(x_NI, weight.mT)
            else:
                y_KNO = torch.baddbmm(bias[:, None], x_NI, weight.mT)
            return y_KNO.view(*shape[:-1], -1)
        y_NO = F.linear(x_NI, weight, bias)
        if K == 1:
            return y_NO.view(1, *shape[-3:-1], -1)
        # Make each carry-on's output contiguous; later results would be strided otherwise.
        return y_NO.view(*shape[:-1], K, -1).movedim(2, 0).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_KBTO,), (x_NI, weight_OI) = gradients, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if ctx.one_product and len(grad_KBTO) > 1:
            grad_KBTO = grad_KBTO.movedim(0, 2).flatten(2)
        grad_NO = grad_KBTO.flatten(0 if ctx.one_product else 1, -2)
        grad_weight = grad_bias = grad_x = None
        if needs_weight:
            grad_weight = _weight_gradient(grad_NO, x_NI, ctx.weight_KOI, ctx.one_product)
        if needs_bias:
            grad_bias = _accumulated(_sum_over_tokens(grad_NO), ctx.bias_KO)
        if needs_x:
            grad_x = (grad_NO @ weight_OI).to(ctx.x_dtype).view(ctx.shape)
        return grad_x, grad_weight, grad_bias


def _in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight or bias in ``dtype``: the optimiser's copy, if it has that dtype."""
    low: Tensor | None = getattr(value, LOW_PRECISION_COPY, None)
    return low if low is not None and low.dtype == dtype else value.to(dtype)


def _accumulated(gradient: Tensor, value: Tensor) -> Tensor | None:
    """Add a gradient to its value's buffer and return None; without a buffer, return it."""
    gradient = gradient.view(value.shape)
    buffer: Tensor | None = getattr(value, GRADIENT_BUFFER, None)
    if buffer is None:
        return gradient.to(value.dtype)
    buffer.add_(gradient)
    return None


def _weight_gradient(
    grad_NO: Tensor, x_NI: Tensor, weight_KOI: Tensor, one_product: bool
) -> Tensor | None:
    """Return the gradient of the weights, or None if it was added to their buffer."""
    buffer_KOI: Tensor | None = getattr(weight_KOI, GRADIENT_BUFFER, None)
    # The buffers of several layers are not contiguous, as one product for all would need.
    fits = buffer_KOI is not None and (len(buffer_KOI) == 1 or not one_product)
    if buffer_KOI is not None and fits and buffer_KOI.dtype == grad_NO.dtype:
        if one_product:
            buffer_KOI[0].addmm_(grad_NO.mT, x_NI)
        else:
            buffer_KOI.baddbmm_(grad_NO.mT, x_NI)
        return None
    return _accumulated(grad_NO.mT @ x_NI, weight_KOI)


def _sum_over_tokens(grad_NO: Tensor) -> Tensor:
    """Return the sums (K)O over N."""
    by_product = grad_NO.ndim == 2 and grad_NO.is_cuda
    return grad_NO.new_ones(len(grad_NO)) @ grad_NO if by_product else grad_NO.sum(dim=-2)
