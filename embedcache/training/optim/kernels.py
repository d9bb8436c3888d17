"""A step of AdamW with states in pinned host memory, as one Triton kernel: see `lowbit`.

Each program reads the states of some parameters over the bus, takes the step, and writes them back.
Thousands of programs run at a time and keep the bus busy in both directions. Only parameters and
gradients are on the device.

Axes: K carry-ons, P parameters of one, B parameters of a program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedcache.training.optim.lowbit import LOWEST, STEPS

BLOCK, WARPS = 2048, 4
"""Parameters and warps of one program. A thread handles 32 bytes of each state."""


def step_over_bus(
    values_KP: Tensor,
    gradient_KP: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    arguments: Sequence[Tensor],
    beta2_K: Tensor,
    decay_K: Tensor,
    matrices: int,
    *,
    beta1: float,
    epsilon: float,
) -> None:
    """Take a step with every carry-on that is not skipped. All tensors are contiguous.

    Args:
        values_KP: parameters, bfloat16, on the device.
        gradient_KP: gradients, bfloat16, on the device.
        states: low halves, first moments and codes of second moments, pinned, [K, P] each.
        arguments: learning rates, numbers of earlier steps, and flags (1 skips a carry-on), [K]
            each.
        beta2_K: decay of the second moment.
        decay_K: weight decay of the first ``matrices`` parameters.
        matrices: number of parameters to which weight decay applies.
        beta1: decay of the first moment.
        epsilon: added to the root of the second moment.
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
            *arguments,
            beta2_K,
            decay_K,
            P,
            matrices,
            BETA1=beta1,
            LOG_BETA1=math.log2(beta1),
            EPSILON=epsilon,
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
    steps,
    skip,
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
    if tl.load(skip + k) == 0:
        place_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside_B = place_B < weights
        at_B = k * weights + place_B
        before = tl.load(steps + k)
        step = before + 1
        by = tl.load(rate + k)
        keep = tl.load(beta2 + k)
        shrink = 1 - by * tl.load(decay + k)

        high_B = tl.load(values + at_B, mask=inside_B, other=0).to(tl.int32)
        bits_B = (high_B << 16) + tl.load(low + at_B, mask=inside_B, other=0).to(tl.int32)
        exact_B = bits_B.to(tl.float32, bitcast=True)
        gradient_B = tl.load(gradient + at_B, mask=inside_B, other=0).to(tl.float32)
        mean_B = tl.load(mean + at_B, mask=inside_B, other=0).to(tl.float32)
        code_B = tl.load(square + at_B, mask=inside_B, other=0).to(tl.int32) & 0xFFFF
        value_B = tl.exp2(code_B.to(tl.float32) / STEPS + LOWEST)

        mean_B = BETA1 * mean_B + (1 - BETA1) * gradient_B
        square_B = tl.where(code_B == 0, 0.0, keep * value_B) + (1 - keep) * gradient_B * gradient_B
        exact_B = tl.where(place_B < matrices, exact_B * shrink, exact_B)
        root_B = tl.sqrt(square_B / (1 - tl.exp2(step * tl.log2(keep)))) + EPSILON
        exact_B -= by / (1 - tl.exp2(step * LOG_BETA1)) * mean_B / root_B

        bits_B = exact_B.to(tl.int32, bitcast=True)
        high_B = (bits_B + 0x8000) >> 16
        tl.store(values + at_B, high_B.to(tl.int16), mask=inside_B)
        tl.store(low + at_B, (bits_B - (high_B << 16)).to(tl.int16), mask=inside_B)
        tl.store(mean + at_B, mean_B.to(mean.dtype.element_ty), mask=inside_B)
        # The random numbers of `lowbit.draws`, in 32 bits
        uniform_B = place_B.to(tl.uint32) + before.to(tl.uint32) * 0x9E3779B9
        uniform_B = (uniform_B ^ (uniform_B >> 16)) * 0x7FEB352D
        uniform_B = (uniform_B ^ (uniform_B >> 15)) * 0x846CA68B
        uniform_B = uniform_B ^ (uniform_B >> 16)
        drawn_B = (uniform_B >> 8).to(tl.float32) / 16777216.0
        steps_B = tl.floor(tl.log2(square_B / value_B) * STEPS + drawn_B)
        code_B = tl.clamp(code_B.to(tl.float32) + steps_B, 0.0, 65535.0).to(tl.int32)
        tl.store(square + at_B, code_B.to(tl.int16), mask=inside_B)
