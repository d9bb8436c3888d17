"""What a carry-on computes between its products: norms, rotations and gates.

On CUDA, where Triton is installed, each is one kernel a direction (`kernels`); elsewhere PyTorch's.

Axes: K stacked carry-ons, B batch, T time, H hidden of the base, R width, N heads, D head width.
(K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.device import has_triton


def fused(x: Tensor) -> bool:
    """Say whether what is computed of ``x`` is left to Triton's kernels."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and has_triton()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product takes ``x`` in: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def residual_norm(
    h_BTR: Tensor, more_BTR: Tensor | None, weight_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return h + more, and its root-mean-square norm times weight_(K)R, both (K)BTR.

    By a kernel the norm comes in the dtype that a product takes.
    """
    if fused(h_BTR):
        from embedcache.carryon import kernels

        return kernels.residual_norm(h_BTR, more_BTR, weight_R, product_dtype(h_BTR))
    if more_BTR is not None:
        h_BTR = h_BTR + more_BTR
    shape = weight_R.shape[-1:]
    if weight_R.ndim == 1:
        return h_BTR, F.rms_norm(h_BTR, shape, weight_R)
    return h_BTR, F.rms_norm(h_BTR, shape) * weight_R[:, None, None]


def gated(h_BTR: Tensor, branch: nn.Linear, gate: nn.Linear) -> Tensor:
    """Return branch(h) · σ(gate(h)), (K)BTH; the layers can leave their biases to others."""
    if fused(h_BTR):
        from embedcache.carryon import kernels

        parts = branch(h_BTR, biased=False), gate(h_BTR, biased=False)
        return kernels.gated(*parts, branch.bias, gate.bias)
    return branch(h_BTR) * torch.sigmoid(gate(h_BTR))


def rotary_angles(positions_BT: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [(K,) B, T, 1, D/2], of the rotary embedding (RoFormer, 2104.09864).

    ``positions_BT`` may have K as its first axis.
    """
    exponent = np.arange(0, head_width, 2) / head_width
    if positions_BT.device.type == "cpu":
        # By numpy: torch's first cosine in a process now and then comes out less accurate, which
        # would make two runs differ.
        angles = positions_BT.numpy()[..., None, None] * 10000.0**-exponent
        cos, sin = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
    else:
        # Made there: a copy would wait for the device, and cannot be captured.
        steps = torch.arange(0, head_width, 2, dtype=torch.float64, device=positions_BT.device)
        frequency = 10000.0 ** -(steps / head_width)
        on_device = positions_BT[..., None, None] * frequency
        cos, sin = on_device.cos(), on_device.sin()
    return cos.float(), sin.float()


def rotated(qkv_BTPND: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, rotated, and values, each (K)BTND, of [(K,) B, T, 3, N, D]."""
    if fused(qkv_BTPND):
        from embedcache.carryon import kernels

        return kernels.rotated(qkv_BTPND, *rotary)
    apply: Any = _Rotated.apply  # torch leaves it untyped
    qk_BTPND, v_BTND = apply(qkv_BTPND, *rotary)
    q_BTND, k_BTND = qk_BTPND.unbind(-3)
    return q_BTND, k_BTND, v_BTND


def rotate(x_BTND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (first half, second half) of each head by the angles of its position."""
    wide = torch.promote_types(x_BTND.dtype, torch.float32)
    cos, sin = (part.to(wide) for part in rotary)
    both, signed = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    x = x_BTND.to(wide)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * both).addcmul_(swapped, signed).to(x_BTND.dtype)


class _Rotated(torch.autograd.Function):
    """Queries and keys in one, rotated, and values; their gradient is that rotated back."""

    @staticmethod
    def forward(ctx: Any, qkv_BTPND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        ctx.save_for_backward(cos, sin)
        rotated_BTPND = rotate(qkv_BTPND[..., :2, :, :], (cos, sin))
        return rotated_BTPND, qkv_BTPND[..., 2, :, :].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (qk_BTPND, v_BTND), (cos, sin) = gradients, ctx.saved_tensors
        back_BTPND = rotate(qk_BTPND, (cos, -sin))
        return torch.cat([back_BTPND, v_BTND.unsqueeze(-3)], dim=-3), None, None
