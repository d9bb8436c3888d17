"""The operations of a carry-on between its products: norms, rotations and gates.

On CUDA, if Triton is installed, each is one kernel forward and one backward (`kernels`). Otherwise
PyTorch computes it.

Axes: K stacked carry-ons, B rows of a batch, T time, H hidden of the base, R width, E heads, F
width of a head. (K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.device import has_triton


def fused(x: Tensor) -> bool:
    """Return whether the Triton kernels compute on ``x``."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and has_triton()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product of ``x``: autocast's, or else the dtype of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over ``x`` and of its rotation: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def one_over_rms(x_BTH: Tensor, eps: float) -> Tensor:
    """Return the reciprocal of each token's root mean square, [B, T, 1], at least float32."""
    # A vector norm does not write all squares to memory on a CPU.
    norm_BT1 = torch.linalg.vector_norm(x_BTH, dim=-1, keepdim=True)
    return (norm_BT1.to(wide_dtype(x_BTH)).square() / x_BTH.shape[-1] + eps).rsqrt()


def residual_norm(
    h_BTR: Tensor, more_BTR: Tensor | None, weight_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return h + more, and its root-mean-square norm times the weight, both (K)BTR.

    Args:
        h_BTR: the residual stream, with K as the first axis of a stack.
        more_BTR: what is added to it, or None.
        weight_R: the norm's weight, (K)R. The normed result has the dtype of products.
    """
    if fused(h_BTR):
        from embedcache.carryon.nn import kernels

        return kernels.residual_norm(h_BTR, more_BTR, weight_R, product_dtype(h_BTR))
    if more_BTR is not None:
        h_BTR = h_BTR + more_BTR
    apply: Any = _Norm.apply  # torch leaves it untyped
    return h_BTR, apply(h_BTR, weight_R, product_dtype(h_BTR))


class _Norm(torch.autograd.Function):
    """A root-mean-square norm, or K of them, in fewer passes than PyTorch's takes with autograd."""

    @staticmethod
    def forward(ctx: Any, h_BTR: Tensor, weight_R: Tensor, dtype: torch.dtype) -> Tensor:
        wide_BTR = h_BTR.to(wide_dtype(h_BTR))
        weight_R = weight_R if weight_R.ndim == 1 else weight_R[:, None, None]
        scale_BT1 = one_over_rms(wide_BTR, torch.finfo(wide_BTR.dtype).eps)
        ctx.save_for_backward(h_BTR, weight_R, scale_BT1)
        return (wide_BTR * scale_BT1).mul_(weight_R).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h_BTR, weight_R, scale_BT1 = ctx.saved_tensors
        grad_BTR = gradients[0].to(scale_BT1.dtype, copy=True)
        unit_BTR = h_BTR * scale_BT1
        grad_weight_BTR = grad_BTR * unit_BTR
        grad_BTR.mul_(weight_R)
        projection_BT1 = (grad_weight_BTR * weight_R).mean(dim=-1, keepdim=True)
        grad_BTR.addcmul_(unit_BTR, projection_BT1, value=-1).mul_(scale_BT1)
        grad_weight_R = grad_weight_BTR.sum(dim=(-3, -2)).to(weight_R.dtype)
        return grad_BTR.to(h_BTR.dtype), grad_weight_R, None


def gated(h_BTR: Tensor, branch: nn.Linear, gate: nn.Linear) -> Tensor:
    """Return branch(h) · σ(gate(h)), (K)BTH."""
    if fused(h_BTR):
        from embedcache.carryon.nn import kernels

        parts = branch(h_BTR, biased=False), gate(h_BTR, biased=False)
        return kernels.gated(*parts, branch.bias, gate.bias)
    return branch(h_BTR) * torch.sigmoid(gate(h_BTR))


def rotary_angles(positions_BT: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [(K,) B, T, 1, F/2], of the rotary embedding (arXiv 2104.09864).

    ``positions_BT`` may have K as its first axis.
    """
    if positions_BT.device.type == "cpu":
        # A power of two above the last position: the cache holds few lengths.
        table = _angles(1 << int(positions_BT.max()).bit_length(), head_width)
        cos, sin = (part[positions_BT].unsqueeze(-2) for part in table)
        return cos, sin
    # Computed on the device: a copy would wait for it, and a CUDA graph could not record it.
    steps = torch.arange(0, head_width, 2, dtype=torch.float64, device=positions_BT.device)
    frequency = 10000.0 ** -(steps / head_width)
    angle = positions_BT[..., None, None] * frequency
    return angle.cos().float(), angle.sin().float()


@lru_cache(maxsize=8)
def _angles(positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [positions, F/2], float32.

    NumPy computes them: the first cosine that torch computes in a process is sometimes less
    accurate, which would make two runs differ.
    """
    exponent = np.arange(0, head_width, 2) / head_width
    angle = np.arange(positions)[:, None] * 10000.0**-exponent
    return torch.from_numpy(np.cos(angle)).float(), torch.from_numpy(np.sin(angle)).float()


def rotated(qkv_BT3EF: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys and values, each (K)BTEF."""
    if fused(qkv_BT3EF):
        from embedcache.carryon.nn import kernels

        return kernels.rotated(qkv_BT3EF, *rotary)
    q_BTEF, k_BTEF, v_BTEF = qkv_BT3EF.unbind(-3)
    return rotate(q_BTEF, rotary), rotate(k_BTEF, rotary), v_BTEF


def rotate(x_BTEF: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (first half, second half) of each head by the angles of its position."""
    x = x_BTEF.to(wide_dtype(x_BTEF))
    cos, sin = (part.to(x.dtype) for part in rotary)
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).addcmul_(swapped, sin).to(x_BTEF.dtype)
