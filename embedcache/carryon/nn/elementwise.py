"""What a carry-on computes between its products: norms, rotations and gates.

On CUDA, where Triton is installed, each is one kernel a direction (`kernels`); elsewhere PyTorch's.

Axes: K stacked carry-ons, B batch, T time, H hidden of the base, R width, N heads, D head width.
(K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.device import has_triton


def fused(x: Tensor) -> bool:
    """Say whether what is computed of ``x`` is left to Triton's kernels."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and has_triton()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product takes ``x`` in: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over ``x``, and rotations of it, are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def one_over_rms(x_BTH: Tensor, eps: float) -> Tensor:
    """Return one over each token's root mean square, _BT1, at least float32."""
    # By its norm: a CPU's squares would be a tensor of their own.
    length_BT1 = torch.linalg.vector_norm(x_BTH, dim=-1, keepdim=True)
    return (length_BT1.to(wide_dtype(x_BTH)).square() / x_BTH.shape[-1] + eps).rsqrt()


def residual_norm(
    h_BTR: Tensor, more_BTR: Tensor | None, weight_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return h + more, and its root-mean-square norm times weight_(K)R, both (K)BTR.

    The norm comes in the dtype that a product takes.
    """
    if fused(h_BTR):
        from embedcache.carryon.nn import kernels

        return kernels.residual_norm(h_BTR, more_BTR, weight_R, product_dtype(h_BTR))
    if more_BTR is not None:
        h_BTR = h_BTR + more_BTR
    apply: Any = _Norm.apply  # torch leaves it untyped
    return h_BTR, apply(h_BTR, weight_R, product_dtype(h_BTR))


class _Norm(torch.autograd.Function):
    """A root-mean-square norm, or K of them, in fewer passes than autograd makes of PyTorch's."""

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
        back_BTR = gradients[0].to(scale_BT1.dtype, copy=True)
        unit_BTR = h_BTR * scale_BT1
        of_weight_BTR = back_BTR * unit_BTR
        back_BTR.mul_(weight_R)
        along_BT1 = (of_weight_BTR * weight_R).mean(dim=-1, keepdim=True)
        back_BTR.addcmul_(unit_BTR, along_BT1, value=-1).mul_(scale_BT1)
        of_weight = of_weight_BTR.sum(dim=(-3, -2)).to(weight_R.dtype)
        return back_BTR.to(h_BTR.dtype), of_weight, None


def gated(h_BTR: Tensor, branch: nn.Linear, gate: nn.Linear) -> Tensor:
    """Return branch(h) · σ(gate(h)), (K)BTH; the layers can leave their biases to others."""
    if fused(h_BTR):
        from embedcache.carryon.nn import kernels

        parts = branch(h_BTR, biased=False), gate(h_BTR, biased=False)
        return kernels.gated(*parts, branch.bias, gate.bias)
    return branch(h_BTR) * torch.sigmoid(gate(h_BTR))


def rotary_angles(positions_BT: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [(K,) B, T, 1, D/2], of the rotary embedding (RoFormer, 2104.09864).

    ``positions_BT`` may have K as its first axis.
    """
    if positions_BT.device.type == "cpu":
        # One position above the last: what is cached is of few lengths.
        known = _angles(1 << int(positions_BT.max()).bit_length(), head_width)
        cos, sin = (part_TD[positions_BT].unsqueeze(-2) for part_TD in known)
        return cos, sin
    # Made there: a copy would wait for the device, and cannot be captured.
    steps = torch.arange(0, head_width, 2, dtype=torch.float64, device=positions_BT.device)
    frequency = 10000.0 ** -(steps / head_width)
    on_device = positions_BT[..., None, None] * frequency
    return on_device.cos().float(), on_device.sin().float()


@lru_cache(maxsize=8)
def _angles(positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [positions, D/2], float32.

    By numpy: torch's first cosine in a process now and then comes out less accurate, which would
    make two runs differ.
    """
    exponent = np.arange(0, head_width, 2) / head_width
    angle_TD = np.arange(positions)[:, None] * 10000.0**-exponent
    cos_TD, sin_TD = np.cos(angle_TD), np.sin(angle_TD)
    return torch.from_numpy(cos_TD).float(), torch.from_numpy(sin_TD).float()


def rotated(qkv_BTPND: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, rotated, and values, each (K)BTND, of [(K,) B, T, 3, N, D]."""
    if fused(qkv_BTPND):
        from embedcache.carryon.nn import kernels

        return kernels.rotated(qkv_BTPND, *rotary)
    apply: Any = _Rotated.apply  # torch leaves it untyped
    qk_BTPND, v_BTND = apply(qkv_BTPND, *rotary)
    q_BTND, k_BTND = qk_BTPND.unbind(-3)
    return q_BTND, k_BTND, v_BTND


def rotate(x_BTND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (first half, second half) of each head by the angles of its position."""
    return _turned(x_BTND, *_signed(x_BTND, *rotary))


def _signed(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of both halves, [..., D], the first half's sines negative."""
    cos, sin = cos.to(wide_dtype(x)), sin.to(wide_dtype(x))
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _turned(x_BTND: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate by what `_signed` returns; or rotate back."""
    x = x_BTND.to(cos.dtype)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).addcmul_(swapped, sin, value=-1 if back else 1).to(x_BTND.dtype)


class _Rotated(torch.autograd.Function):
    """Queries and keys in one, rotated, and values; their gradient is that rotated back."""

    @staticmethod
    def forward(ctx: Any, qkv_BTPND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        signed = _signed(qkv_BTPND, cos.unsqueeze(-3), sin.unsqueeze(-3))
        ctx.save_for_backward(*signed)
        return _turned(qkv_BTPND[..., :2, :, :], *signed), qkv_BTPND[..., 2, :, :].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qk_BTPND, v_BTND = gradients
        back_BTPND = _turned(qk_BTPND, *ctx.saved_tensors, back=True)
        return torch.cat([back_BTPND, v_BTND.unsqueeze(-3)], dim=-3), None, None
