"""AdamW whose states lie in pinned host memory, in one Triton kernel: see `halves`.

A program has some weights of one carry-on: it reads their states over the bus, steps, and writes
them back. Thousands are under way at a time, so that the bus is busy in both directions and nothing
but the weights and gradients is on the device.

Axes: K carry-ons, P weights of one, B weights of a program.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedcache.training.optim.lowbit import LOWEST, STEPS
from embedcache.training.optim.states import BETA1, EPSILON

if TYPE_CHECKING:
    from embedcache.training.optim.states import Due

BLOCK, WARPS = 2048, 4
"""Weights of a program, and its warps: 32 bytes of each state a thread."""
LOG_BETA1 = math.log2(BETA1)


def step_over_bus(
    values_KP: Tensor,
    gradient_KP: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    due: Due,
    beta2_K: Tensor,
    decay_K: Tensor,
    matrices: int,
) -> None:
    """Step every carry-on that does not stay as it is.

    ``states`` are low halves, means and codes of squares, [K, P] each, pinned; all is contiguous.
    """
    K, P = values_KP.shape
    if not K * P:
        return
    low_KP, mean_KP, square_KP = states
    with torch.cuda.device_of(values_KP):  # Triton launches on the current device
        _step[(triton.cdiv(P, BLOCK), K)](
            values_KP.view(torch.int16),
            gradient_KP,
            low_KP,
            mean_KP,
            square_KP,
            *due,
            beta2_K,
            decay_K,
            P,
            matrices,
            BETA1=BETA1,
            LOG_BETA1=LOG_BETA1,
            EPSILON=EPSILON,
            STEPS=STEPS,
            LOWEST=LOWEST,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _step(
    values,
    gradient,
    low,
    mean,
    square,
    rate,
    taken,
    still,
    beta2,
    decay,
    weights,
    matrices,
    BETA1: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    EPSILON: tl.constexpr,
    STEPS: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(1).to(tl.int64)
    if tl.load(still + k) == 0:
        place_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside_B = place_B < weights
        at_B = k * weights + place_B
        before = tl.load(taken + k)
        step = before + 1
        by = tl.load(rate + k)
        keep = tl.load(beta2 + k)
        shrink = 1 - by * tl.load(decay + k)

        high_B = tl.load(values + at_B, mask=inside_B, other=0).to(tl.int32)
        bits_B = (high_B << 16) + tl.load(low + at_B, mask=inside_B, other=0).to(tl.int32)
        exact_B = bits_B.to(tl.float32, bitcast=True)
        slope_B = tl.load(gradient + at_B, mask=inside_B, other=0).to(tl.float32)
        mean_B = tl.load(mean + at_B, mask=inside_B, other=0).to(tl.float32)
        code_B = tl.load(square + at_B, mask=inside_B, other=0).to(tl.int32) & 0xFFFF
        value_B = tl.exp2(code_B.to(tl.float32) / STEPS + LOWEST)

        mean_B = BETA1 * mean_B + (1 - BETA1) * slope_B
        square_B = tl.where(code_B == 0, 0.0, keep * value_B) + (1 - keep) * slope_B * slope_B
        exact_B = tl.where(place_B < matrices, exact_B * shrink, exact_B)
        root_B = tl.sqrt(square_B / (1 - tl.exp2(step * tl.log2(keep)))) + EPSILON
        exact_B -= by / (1 - tl.exp2(step * LOG_BETA1)) * mean_B / root_B

        bits_B = exact_B.to(tl.int32, bitcast=True)
        high_B = (bits_B + 0x8000) >> 16
        tl.store(values + at_B, high_B.to(tl.int16), mask=inside_B)
        tl.store(low + at_B, (bits_B - (high_B << 16)).to(tl.int16), mask=inside_B)
        tl.store(mean + at_B, mean_B.to(mean.dtype.element_ty), mask=inside_B)
        # `draws`, in 32 bits
        chance_B = place_B.to(tl.uint32) + before.to(tl.uint32) * 0x9E3779B9
        chance_B = (chance_B ^ (chance_B >> 16)) * 0x7FEB352D
        chance_B = (chance_B ^ (chance_B >> 15)) * 0x846CA68B
        chance_B = chance_B ^ (chance_B >> 16)
        drawn_B = (chance_B >> 8).to(tl.float32) / 16777216.0
        steps_B = tl.floor(tl.log2(square_B / value_B) * STEPS + drawn_B)
        code_B = tl.clamp(code_B.to(tl.float32) + steps_B, 0.0, 65535.0).to(tl.int32)
        tl.store(square + at_B, code_B.to(tl.int16), mask=inside_B)
