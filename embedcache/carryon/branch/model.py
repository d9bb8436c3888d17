"""The branch kind: a few transformer blocks on the base's embeddings, with a gate.

    y(α) = W (x + α · g(σ(x), s) ⊙ f(σ(x), s))          GPT Carry-On, arXiv 2504.07513

f is the branch, g the gate and σ the bridge; s are the token ids. W is applied by the caller.

Axes: K stacked carry-ons, B rows of a batch, T time, U keys of attention, H hidden of the base,
L taps, R width, E heads, F width of a head, I inputs of a layer. (K) stands for an axis that only
a stack has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from embedcache.carryon.blend import Alpha, blend
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.nn.attention import Spans, attend
from embedcache.carryon.nn.elementwise import (
    gated,
    one_over_rms,
    product_dtype,
    residual_norm,
    rotary_angles,
    rotated,
)
from embedcache.carryon.nn.linear import Linear
from embedcache.carryon.protocol import CarryOn, CarryOnInputs, InputStats, KeyValueUpdate

EPS = 1e-6
"""Added to the mean square of an input before its root is taken, so that zeros stay finite."""


TINY = torch.finfo(torch.float32).tiny
"""An ``eps`` that changes no variance; some versions of PyTorch refuse 0."""


class Branch(CarryOn):
    """A trainable branch on frozen embeddings. Its output is initialised to zero."""

    config: BranchConfig

    def __init__(self, config: BranchConfig, hidden: int):
        super().__init__(config, hidden)
        inputs = len(config.taps) + config.token_input
        # Set from a sample of train by `calibrate`, stored with the weights.
        self.mean_LH: Tensor
        self.scale_LH: Tensor
        self.register_buffer("mean_LH", torch.zeros(len(config.taps), hidden))
        self.register_buffer("scale_LH", torch.ones(len(config.taps), hidden))
        self.project = Linear(hidden * inputs, config.width)
        self.blocks = nn.ModuleList(_Block(config, index) for index in range(config.blocks))
        self.norm = _Norm(config.width)
        self.branch = Linear(config.width, hidden)
        self.gate = Linear(config.width, hidden) if config.gate else None
        # Adam moves every weight by the learning rate, so the first steps of the output grow with
        # the width: without this scale a branch of width 256 first raises the loss far above the
        # base's. A gate starts half open.
        nn.init.constant_(self.norm.weight, min(1.0, (128 if config.gate else 64) / config.width))
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    @property
    def key_value_layers(self) -> int:
        """One key-value layer a block."""
        return self.config.blocks

    def features(self, inputs: CarryOnInputs, alpha: Alpha = 1.0) -> Tensor:
        """Return h_(K)BTR, the normed output of the last block; α does not change it."""
        # The residual stream keeps the precision of the weights where products take less.
        dtype = self.project.weight.dtype
        parts = [
            _input(inputs.x_BTH[tap], mean_H, scale_H, dtype, self.config.bridge_bits)
            for tap, mean_H, scale_H in zip(
                self.config.taps, self.mean_LH, self.scale_LH, strict=True
            )
        ]
        if self.config.token_input:
            if inputs.tokens_BTH is None:
                raise ValueError("this carry-on reads token ids: pass `tokens_BTH=`")
            parts.append(_unit_rms(inputs.tokens_BTH.to(dtype)))
        inputs_BTI = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        h_BTR = self.project(inputs_BTI).to(dtype)
        rotary = rotary_angles(inputs.positions_BT, self.config.head_width)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h_BTR = checkpoint(
                    block,
                    h_BTR,
                    rotary,
                    inputs.attention,
                    inputs.update,
                    use_reentrant=False,
                    preserve_rng_state=False,  # a block uses no random numbers
                )
            else:
                h_BTR = block(h_BTR, rotary, inputs.attention, inputs.update)
        normed_BTR: Tensor = self.norm(h_BTR)[1]
        return normed_BTR

    def embeddings(self, h: Tensor, x: Tensor, alpha: Alpha = 1.0) -> Tensor:
        """Return x + α · g ⊙ f; ``h`` is (K)BTR."""
        return blend(x, self.change(h).to(x.dtype), alpha)

    def change(self, h_BTR: Tensor) -> Tensor:
        """Return g ⊙ f, (K)BTH: what the branch adds at α = 1."""
        if self.gate is not None:
            return gated(h_BTR, self.branch, self.gate)
        change_BTH: Tensor = self.branch(h_BTR)
        return change_BTH

    @torch.no_grad()
    def calibrate(self, stats: dict[str, InputStats]) -> None:
        """Set the scales that bring each component of each tap to mean 0 and variance 1.

        A few components of a base's embeddings are ten times as large as the others. Without
        scales, they dominate the input of a narrow branch.
        """
        for index, tap in enumerate(self.config.taps):
            mean_H, deviation_H = stats[tap]
            self.mean_LH[index] = mean_H.to(self.mean_LH.dtype)
            self.scale_LH[index] = (1 / deviation_H.clamp_min(1e-6)).to(self.scale_LH.dtype)


class _Norm(nn.Module):
    """A root-mean-square norm of the residual stream; a stack holds K, weight_(K)R."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h_BTR: Tensor, more_BTR: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return h + more and its norm, both (K)BTR."""
        return residual_norm(h_BTR, more_BTR, self.weight)


class _Block(nn.Module):
    """A pre-norm transformer block with rotary attention."""

    def __init__(self, config: BranchConfig, index: int):
        super().__init__()
        width = config.width
        self.index = index
        self.head_width = config.head_width
        self.norm_attention = _Norm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.norm_mlp = _Norm(width)
        self.up = Linear(width, config.mlp_ratio * width)
        self.down = Linear(config.mlp_ratio * width, width)

    def forward(
        self,
        h_BTR: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: Tensor | Spans | None,
        update: KeyValueUpdate | None,
    ) -> Tensor:
        h_BTR, normed_BTR = self.norm_attention(h_BTR)
        qkv_BT3EF = self.qkv(normed_BTR).unflatten(-1, (3, -1, self.head_width))
        q_BTEF, k_BTEF, v_BTEF = rotated(qkv_BT3EF, rotary)
        if update is not None:
            new = k_BTEF.transpose(-3, -2), v_BTEF.transpose(-3, -2)
            k_BTEF, v_BTEF = (x.transpose(-3, -2) for x in update(self.index, *new))
        attended_BTEF = attend(q_BTEF, k_BTEF, v_BTEF, attention)
        h_BTR, normed_BTR = self.norm_mlp(h_BTR, self.out(attended_BTEF.flatten(-2)))
        mlp_BTR: Tensor = self.down(F.gelu(self.up(normed_BTR)))
        return h_BTR + mlp_BTR


def bridge(x_BTH: Tensor, bits: int) -> Tensor:
    """Return x quantised to ``bits`` bits a value, symmetrically, with one scale per token."""
    if bits == 16:
        return x_BTH
    largest = 2 ** (bits - 1) - 1
    scale = (x_BTH.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(1e-12)
    return (x_BTH / scale).round().clamp(-largest, largest) * scale


def _input(
    x_BTH: Tensor, mean_H: Tensor, scale_H: Tensor, dtype: torch.dtype, bridge_bits: int
) -> Tensor:
    """Return a tap's embeddings with standardised components, scaled to unit mean square a token.

    The result has ``dtype``. On a CPU it has the dtype of products if no step needs more precision,
    because memory traffic takes most of the time there.
    """
    low = product_dtype(mean_H)
    if x_BTH.is_cpu and low == x_BTH.dtype != mean_H.dtype and bridge_bits == 16:
        x_NH = F.batch_norm(x_BTH.flatten(0, -2), mean_H, scale_H**-2, eps=TINY)
        return x_NH.mul_(one_over_rms(x_NH, EPS).to(low)).view(x_BTH.shape)
    return _unit_rms(bridge(_standard(x_BTH, mean_H, scale_H, dtype), bridge_bits)).to(dtype)


def _standard(x_BTH: Tensor, mean_H: Tensor, scale_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x − mean) · scale by component, in ``dtype``."""
    if not x_BTH.is_cpu:
        return (x_BTH.to(dtype) - mean_H) * scale_H
    # One copy, changed in place: on a CPU allocating memory takes longer than the arithmetic.
    return x_BTH.to(dtype, copy=True).sub_(mean_H).mul_(scale_H)


def _unit_rms(x_BTH: Tensor) -> Tensor:
    """Divide each token's vector by its root mean square; a few tokens are much longer."""
    if x_BTH.is_cpu:
        return x_BTH * one_over_rms(x_BTH, EPS)
    return F.rms_norm(x_BTH, x_BTH.shape[-1:], eps=EPS)
