"""The branch, the gate and the bridge.

    y(α) = W (x + α · g(σ(x), s) ⊙ f(σ(x), s))          GPT Carry-On, arXiv 2504.07513

`CarryOn` computes g ⊙ f, the *delta*; adding it and applying W is its user's work, since the
trainer, the evaluator and the live base each do that in their own way.

A module may hold K carry-ons of one shape, stacked: every weight then has K as its first axis, and
so has the delta. Their inputs are one batch that all of them see, or K batches, stacked too.

Axes: K stacked carry-ons, B batch, T time, S time of keys, H hidden of the base, P taps, R width,
N heads, D head width, I inputs of a layer. (K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from embedcache.carryon.branch.config import CarryOnConfig
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

EPS = 1e-6
"""What keeps an input's norm from dividing by zero."""

KeyValueUpdate = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a block's number and its new keys and values [B, N, T, D]; returns all of them so far."""


class InputStats(NamedTuple):
    """Mean and standard deviation of each component of a tap's embeddings, float64."""

    mean_H: Tensor
    deviation_H: Tensor

    @classmethod
    def of(cls, sample_NH: Tensor) -> InputStats:
        """Return that of some embeddings."""
        x_NH = sample_NH.double()
        return cls(x_NH.mean(dim=0), x_NH.std(dim=0, correction=0))


class CarryOn(nn.Module):
    """A trainable branch on frozen embeddings. Zero-initialised: it starts as the base."""

    def __init__(self, config: CarryOnConfig, hidden: int):
        super().__init__()
        self.config = config
        self.hidden = hidden
        self.recompute = False
        """Whether training computes a block again for its gradient, rather than keep it."""
        inputs = len(config.taps) + config.token_input
        # Set from a sample of train by `calibrate`, stored with the weights.
        self.mean_PH: Tensor
        self.scale_PH: Tensor
        self.register_buffer("mean_PH", torch.zeros(len(config.taps), hidden))
        self.register_buffer("scale_PH", torch.ones(len(config.taps), hidden))
        self.project = Linear(hidden * inputs, config.width)
        self.blocks = nn.ModuleList(_Block(config, index) for index in range(config.blocks))
        self.norm = _Norm(config.width)
        self.branch = Linear(config.width, hidden)
        self.gate = Linear(config.width, hidden) if config.gate else None
        # Adam moves every weight by the rate, so the output's first steps grow with the width:
        # unscaled, a branch of 256 first throws the loss far above the base's. A gate starts half
        # open.
        nn.init.constant_(self.norm.weight, min(1.0, (128 if config.gate else 64) / config.width))
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(
        self,
        x_BTH: dict[str, Tensor],
        *,
        positions_BT: Tensor,
        tokens_BTH: Tensor | None = None,
        where: Tensor | Spans | None = None,
        update: KeyValueUpdate | None = None,
    ) -> Tensor:
        """Return delta_(K)BTH = g ⊙ f: what `emit` makes of `features`."""
        return self.emit(
            self.features(
                x_BTH, positions_BT=positions_BT, tokens_BTH=tokens_BTH, where=where, update=update
            )
        )

    def features(
        self,
        x_BTH: dict[str, Tensor],
        *,
        positions_BT: Tensor,
        tokens_BTH: Tensor | None = None,
        where: Tensor | Spans | None = None,
        update: KeyValueUpdate | None = None,
    ) -> Tensor:
        """Return h_(K)BTR, what the last block knows of each position.

        A stack takes inputs of the shapes below, seen by all of its carry-ons, or all of them with
        K as first axis.

        Args:
            x_BTH: embeddings by tap; every tap of the configuration must be there.
            positions_BT: position of each token in its sequence, from 0 (RoPE).
            tokens_BTH: the base's token embedding of the ids, where ``token_input`` is set.
            where: mask_BTS, True where a query may see a key, or the `Spans` of one long row; None
                means plain causal attention.
            update: stores keys and values of earlier calls, for generation; not of a stack.
        """
        # The residual stream keeps the weights' precision, also where products are taken in less.
        dtype = self.project.weight.dtype
        parts = [
            _input(x_BTH[tap], mean_H, scale_H, dtype, self.config.bridge_bits)
            for tap, mean_H, scale_H in zip(
                self.config.taps, self.mean_PH, self.scale_PH, strict=True
            )
        ]
        if self.config.token_input:
            if tokens_BTH is None:
                raise ValueError("this carry-on reads token ids: pass tokens_BTH")
            parts.append(_unit_rms(tokens_BTH.to(dtype)))
        inputs_BTI = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        h_BTR = self.project(inputs_BTI).to(dtype)
        rotary = rotary_angles(positions_BT, self.config.head_width)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h_BTR = checkpoint(
                    block,
                    h_BTR,
                    rotary,
                    where,
                    update,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn; and a recording could not
                )
            else:
                h_BTR = block(h_BTR, rotary, where, update)
        normed_BTR: Tensor = self.norm(h_BTR)[1]
        return normed_BTR

    def emit(self, h_BTR: Tensor) -> Tensor:
        """Return delta_(K)BTH of features, each position's for itself."""
        if self.gate is not None:
            return gated(h_BTR, self.branch, self.gate)
        delta_BTH: Tensor = self.branch(h_BTR)
        return delta_BTH

    @torch.no_grad()
    def calibrate(self, input_stats: dict[str, InputStats]) -> None:
        """Bring each component of each tap to zero mean and unit variance, as they are spread.

        A few components of a base's embeddings are ten times the others: unscaled, they are most
        of what a branch of small width sees.
        """
        for index, tap in enumerate(self.config.taps):
            mean_H, deviation_H = input_stats[tap]
            self.mean_PH[index] = mean_H.to(self.mean_PH.dtype)
            self.scale_PH[index] = (1 / deviation_H.clamp_min(1e-6)).to(self.scale_PH.dtype)

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def stack(cls, models: Sequence[CarryOn]) -> CarryOn:
        """Return one module that holds copies of carry-ons of equal shape and calibration."""
        with torch.device("meta"):  # nothing is drawn for nobody
            stacked = cls(models[0].config, models[0].hidden)
        for name, buffer in models[0].named_buffers():
            setattr(stacked, name, buffer.clone())
        layers = dict(stacked.named_modules())
        for name, _ in list(stacked.named_parameters()):
            layer, _, part = name.rpartition(".")
            of_each = [model.get_parameter(name).detach() for model in models]
            setattr(layers[layer], part, nn.Parameter(torch.stack(of_each)))
        return stacked

    def member(self, index: int) -> dict[str, Tensor]:
        """Return the weights of one carry-on of a stack, as views, named as those of one alone."""
        parameters = {name: value.detach()[index] for name, value in self.named_parameters()}
        return parameters | dict(self.named_buffers())


class _Norm(nn.Module):
    """A root-mean-square norm of the residual stream, or K of them: weight_(K)R."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h_BTR: Tensor, more_BTR: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return h + more, and that normed, both (K)BTR."""
        return residual_norm(h_BTR, more_BTR, self.weight)


class _Block(nn.Module):
    """A pre-norm transformer block with rotary attention."""

    def __init__(self, config: CarryOnConfig, index: int):
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
        where: Tensor | Spans | None,
        update: KeyValueUpdate | None,
    ) -> Tensor:
        h_BTR, normed_BTR = self.norm_attention(h_BTR)
        qkv_BTPND = self.qkv(normed_BTR).unflatten(-1, (3, -1, self.head_width))
        q_BTND, k_BTND, v_BTND = rotated(qkv_BTPND, rotary)
        if update is not None:
            new = k_BTND.transpose(-3, -2), v_BTND.transpose(-3, -2)
            k_BTND, v_BTND = (x.transpose(-3, -2) for x in update(self.index, *new))
        attended_BTND = attend(q_BTND, k_BTND, v_BTND, where)
        h_BTR, normed_BTR = self.norm_mlp(h_BTR, self.out(attended_BTND.flatten(-2)))
        mlp_BTR: Tensor = self.down(F.gelu(self.up(normed_BTR)))
        return h_BTR + mlp_BTR


def bridge(x_BTH: Tensor, bits: int) -> Tensor:
    """Return x as it arrives over a bridge of that many bits (symmetric, one scale a token)."""
    if bits == 16:
        return x_BTH
    largest = 2 ** (bits - 1) - 1
    scale = (x_BTH.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(1e-12)
    return (x_BTH / scale).round().clamp(-largest, largest) * scale


def _input(
    x_BTH: Tensor, mean_H: Tensor, scale_H: Tensor, dtype: torch.dtype, bridge_bits: int
) -> Tensor:
    """Return what is made of a tap: each component standardised, then each token's mean square 1.

    In ``dtype``; or, on a CPU, as products take it, if nothing else wants more: what passes through
    its memory is what takes time.
    """
    low = product_dtype(mean_H)
    if x_BTH.is_cpu and low == x_BTH.dtype != mean_H.dtype and bridge_bits == 16:
        x_NH = F.batch_norm(x_BTH.flatten(0, -2), mean_H, scale_H**-2, eps=0.0)
        return x_NH.mul_(one_over_rms(x_NH, EPS).to(low)).view(x_BTH.shape)
    return _unit_rms(bridge(_standard(x_BTH, mean_H, scale_H, dtype), bridge_bits)).to(dtype)


def _standard(x_BTH: Tensor, mean_H: Tensor, scale_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each component less its mean, times its scale, in ``dtype``."""
    if not x_BTH.is_cpu:
        return (x_BTH.to(dtype) - mean_H) * scale_H
    # In one copy: to take new memory costs a CPU more than to compute.
    return x_BTH.to(dtype, copy=True).sub_(mean_H).mul_(scale_H)


def _unit_rms(x_BTH: Tensor) -> Tensor:
    """Divide each token's vector by its root mean square: a few tokens are far from all others."""
    if x_BTH.is_cpu:
        return x_BTH * one_over_rms(x_BTH, EPS)
    return F.rms_norm(x_BTH, x_BTH.shape[-1:], eps=EPS)
