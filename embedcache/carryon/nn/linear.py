"""Linear layers of one carry-on or of a stack, whose products know where weights are kept.

Axes: K stacked carry-ons, B batch, T time, N all of B and T, I and O inputs and outputs. (K) stands
for an axis that only a stack has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.carryon.nn.elementwise import product_dtype

LOW = "embedcache_low"
"""Attribute of a stack's weight or bias: itself in fewer bits, where it is kept so."""
SUM = "embedcache_sum"
"""Attribute of a stack's weight or bias: what its gradients are added to, where it is set."""


class Linear(nn.Linear):
    """A linear layer, or K of them: weight_(K)OI, bias_(K)O."""

    def forward(self, x_BTI: Tensor, *, biased: bool = True) -> Tensor:
        """Return y_(K)BTO; a stack takes x_BTI, seen by all, or x_KBTI."""
        weight, bias = self.weight, self.bias if biased else None
        if weight.ndim == 2:
            return F.linear(x_BTI, weight, bias)
        apply: Any = _Product.apply  # torch leaves it untyped
        y_KBTO: Tensor = apply(x_BTI, weight, bias)
        return y_KBTO


class _Product(torch.autograd.Function):
    """K linear layers of one x_BTI, or of one each, x_KBTI; y_KBTO in either case.

    A weight in fewer bits is the one that is kept so, if that is what a product takes, and a
    gradient is added to the sum that is kept of it: else either would be made for each product.
    Gradients of weights come out as weights lie: of `torch.baddbmm` they come out transposed, and
    are copied. Where the sum has the products' precision, a product adds to it, and no gradient is
    there beside. That of a bias is a product on a GPU: torch's sum takes several times the memory
    of what it sums there, more than all else that a part of few tokens has at a time.
    """

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None) -> Tensor:
        low, K, shape = product_dtype(x_BTI), len(weight_KOI), x_BTI.shape
        ctx.of_x, ctx.shape = x_BTI.dtype, shape
        ctx.weight_KOI, ctx.bias_KO = weight_KOI, bias_KO
        # One alone, or all of one input, are a plain product: that adds the bias on its way.
        ctx.together = K == 1 or x_BTI.ndim == 3
        x_NI = x_BTI.to(low).flatten(0 if ctx.together else 1, -2)
        weight = _in_low(weight_KOI, low)
        bias = None if bias_KO is None else _in_low(bias_KO, low)
        if ctx.together:
            weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
        ctx.save_for_backward(x_NI, weight)
        if not ctx.together:
            if bias is None:
                y_KNO = torch.bmm(x_NI, weight.mT)
            else:
                y_KNO = torch.baddbmm(bias[:, None], x_NI, weight.mT)
            return y_KNO.view(*shape[:-1], -1)
        y_NO = F.linear(x_NI, weight, bias)
        if K == 1:
            return y_NO.view(1, *shape[-3:-1], -1)
        # Each carry-on's lies close: all that is computed of it would be as scattered otherwise.
        return y_NO.view(*shape[:-1], K, -1).movedim(2, 0).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_KBTO,), (x_NI, weight_OI) = gradients, ctx.saved_tensors
        needed = ctx.needs_input_grad
        if ctx.together and len(g_KBTO) > 1:
            g_KBTO = g_KBTO.movedim(0, 2).flatten(2)
        g_NO = g_KBTO.flatten(0 if ctx.together else 1, -2)
        of_weight = of_bias = of_x = None
        if needed[1]:
            of_weight = _of_weights(g_NO, x_NI, ctx.weight_KOI, ctx.together)
        if needed[2]:
            of_bias = _summed_up(_summed(g_NO), ctx.bias_KO)
        if needed[0]:
            of_x = (g_NO @ weight_OI).to(ctx.of_x).view(ctx.shape)
        return of_x, of_weight, of_bias


def _in_low(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight or bias in ``dtype``: as it is kept so, if it is."""
    low: Tensor | None = getattr(value, LOW, None)
    return low if low is not None and low.dtype == dtype else value.to(dtype)


def _summed_up(gradient: Tensor, value: Tensor) -> Tensor | None:
    """Add a gradient to its value's sum, and return None; or it, where there is none."""
    gradient = gradient.view(value.shape)
    into: Tensor | None = getattr(value, SUM, None)
    if into is None:
        return gradient.to(value.dtype)
    into.add_(gradient)
    return None


def _of_weights(g_NO: Tensor, x_NI: Tensor, weight_KOI: Tensor, together: bool) -> Tensor | None:
    """Return the gradient of weights, or None where it was added to their sum.

    On a CPU by one product a carry-on: that of all of them would copy the transposed ones first.
    """
    sum_KOI: Tensor | None = getattr(weight_KOI, SUM, None)
    # The sums of several do not lie one behind the other, as one product of all would want them.
    if sum_KOI is not None and sum_KOI.dtype == g_NO.dtype and (len(sum_KOI) == 1 or not together):
        if together:
            sum_KOI[0].addmm_(g_NO.mT, x_NI)
        elif not g_NO.is_cpu:
            sum_KOI.baddbmm_(g_NO.mT, x_NI)
        else:
            for sum_OI, g, x in zip(sum_KOI, g_NO, x_NI, strict=True):
                sum_OI.addmm_(g.mT, x)
        return None
    if together or not g_NO.is_cpu:
        gradient = g_NO.mT @ x_NI
    else:
        gradient = torch.stack([g.mT @ x for g, x in zip(g_NO, x_NI, strict=True)])
    return _summed_up(gradient, weight_KOI)


def _summed(g_NO: Tensor) -> Tensor:
    """Return the sums (K)O over N."""
    alone = g_NO.ndim == 2 and g_NO.is_cuda
    return g_NO.new_ones(len(g_NO)) @ g_NO if alone else g_NO.sum(dim=-2)
