"""The branch, the gate and the bridge.

    y(α) = W (x + α · g(σ(x), s) ⊙ f(σ(x), s))          GPT Carry-On, arXiv 2504.07513

`CarryOn` computes g ⊙ f, the *delta*; adding it and applying W is its user's work, since the
trainer, the evaluator and the live base each do that in their own way.

Axes: B batch, T time, S time of keys, H hidden of the base, R width, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.carryon.config import CarryOnConfig

KeyValueUpdate = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a block's number and its new keys and values [B, N, T, D]; returns all of them so far."""


class CarryOn(nn.Module):
    """A trainable branch on frozen embeddings. Zero-initialised: it starts as the base."""

    def __init__(self, config: CarryOnConfig, hidden: int):
        super().__init__()
        self.config = config
        self.hidden = hidden
        inputs = len(config.taps) + config.token_input
        # Set from a sample of train by `calibrate`, stored with the weights.
        self.mean_KH: Tensor
        self.scale_KH: Tensor
        self.register_buffer("mean_KH", torch.zeros(len(config.taps), hidden))
        self.register_buffer("scale_KH", torch.ones(len(config.taps), hidden))
        self.project = nn.Linear(hidden * inputs, config.width)
        self.blocks = nn.ModuleList(_Block(config, index) for index in range(config.blocks))
        self.norm = nn.RMSNorm(config.width)
        self.branch = nn.Linear(config.width, hidden)
        self.gate = nn.Linear(config.width, hidden) if config.gate else None
        # Adam moves every weight by the rate, so the output's first steps grow with the width:
        # unscaled, a branch of 256 first throws the loss far above the base's.
        nn.init.constant_(self.norm.weight, min(1.0, 64 / config.width))
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(
        self,
        x_BTH: dict[str, Tensor],
        *,
        positions_BT: Tensor,
        tokens_BTH: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        update: KeyValueUpdate | None = None,
    ) -> Tensor:
        """Return delta_BTH = g ⊙ f.

        Args:
            x_BTH: embeddings by tap; every tap of the configuration must be there.
            positions_BT: position of each token in its sequence, from 0 (RoPE).
            tokens_BTH: the base's token embedding of the ids, where ``token_input`` is set.
            mask_BTS: True where a query may see a key; None means plain causal attention.
            update: stores keys and values of earlier calls, for generation.
        """
        # The residual stream keeps the weights' precision, also where products are taken in less.
        dtype = self.project.weight.dtype
        parts = [
            _unit_rms(bridge((x_BTH[tap].to(dtype) - mean_H) * scale_H, self.config.bridge_bits))
            for tap, mean_H, scale_H in zip(
                self.config.taps, self.mean_KH, self.scale_KH, strict=True
            )
        ]
        if self.config.token_input:
            if tokens_BTH is None:
                raise ValueError("this carry-on reads token ids: pass tokens_BTH")
            parts.append(_unit_rms(tokens_BTH.to(dtype)))
        h_BTR = self.project(torch.cat(parts, dim=-1)).to(dtype)
        rotary = rotary_angles(positions_BT, self.config.head_width)
        mask = None if mask_BTS is None else mask_BTS[:, None]
        for block in self.blocks:
            h_BTR = block(h_BTR, rotary, mask, update)
        h_BTR = self.norm(h_BTR)
        delta_BTH: Tensor = self.branch(h_BTR)
        if self.gate is not None:
            delta_BTH = delta_BTH * torch.sigmoid(self.gate(h_BTR))
        return delta_BTH

    @torch.no_grad()
    def calibrate(self, sample_NH: dict[str, Tensor]) -> None:
        """Set the mean and scale that bring each component of each tap to zero mean, unit variance.

        A few components of a base's embeddings are ten times the others: unscaled, they are most
        of what a branch of small width sees.
        """
        for index, tap in enumerate(self.config.taps):
            x_NH = sample_NH[tap].double()
            deviation_H = x_NH.std(dim=0, correction=0)
            self.mean_KH[index] = x_NH.mean(dim=0).to(self.mean_KH.dtype)
            self.scale_KH[index] = (1 / deviation_H.clamp_min(1e-6)).to(self.scale_KH.dtype)

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Block(nn.Module):
    """A pre-norm transformer block with rotary attention."""

    def __init__(self, config: CarryOnConfig, index: int):
        super().__init__()
        width = config.width
        self.index = index
        self.head_width = config.head_width
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width)
        self.up = nn.Linear(width, config.mlp_ratio * width)
        self.down = nn.Linear(config.mlp_ratio * width, width)

    def forward(
        self,
        h_BTR: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        update: KeyValueUpdate | None,
    ) -> Tensor:
        B, T, R = h_BTR.shape
        qkv = self.qkv(self.norm_attention(h_BTR)).view(B, T, 3, -1, self.head_width)
        q_BNTD, k_BNTD, v_BNTD = qkv.permute(2, 0, 3, 1, 4)
        q_BNTD, k_BNTD = rotate(q_BNTD, rotary), rotate(k_BNTD, rotary)
        if update is not None:
            k_BNTD, v_BNTD = update(self.index, k_BNTD, v_BNTD)
        attended = F.scaled_dot_product_attention(
            q_BNTD, k_BNTD, v_BNTD, attn_mask=mask, is_causal=mask is None
        )
        h_BTR = h_BTR + self.out(attended.transpose(1, 2).reshape(B, T, R))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm_mlp(h_BTR))))
        return h_BTR + mlp


def bridge(x_BTH: Tensor, bits: int) -> Tensor:
    """Return x as it arrives over a bridge of that many bits (symmetric, one scale a token)."""
    if bits == 16:
        return x_BTH
    largest = 2 ** (bits - 1) - 1
    scale = (x_BTH.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(1e-12)
    return (x_BTH / scale).round().clamp(-largest, largest) * scale


def _unit_rms(x_BTH: Tensor) -> Tensor:
    """Divide each token's vector by its root mean square: a few tokens are far from all others."""
    return F.rms_norm(x_BTH, (x_BTH.shape[-1],), eps=1e-6)


def rotary_angles(positions_BT: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [B, 1, T, D/2], of the rotary embedding (RoFormer, 2104.09864)."""
    exponent = np.arange(0, head_width, 2) / head_width
    if positions_BT.device.type == "cpu":
        # By numpy: torch's first cosine in a process now and then comes out less accurate, which
        # would make two runs differ.
        angles = positions_BT.numpy()[:, None, :, None] * 10000.0**-exponent
        cos, sin = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
    else:
        frequency = torch.from_numpy(10000.0**-exponent).to(positions_BT.device)
        on_device = positions_BT[:, None, :, None] * frequency
        cos, sin = on_device.cos(), on_device.sin()
    return cos.float(), sin.float()


def rotate(x_BNTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (first half, second half) of each head by the angles of its position."""
    cos, sin = (part.to(x_BNTD.dtype) for part in rotary)
    first, second = x_BNTD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return mask_BTS: causal, and never across segments; padding (-1) sees only its like."""
    T = segments_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])
