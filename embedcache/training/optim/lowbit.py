"""Parameters and moments of AdamW in 16 bits.

A float32 parameter is split into a bfloat16, which products use, and the 16 remaining bits, so that
no precision is lost. The first moment is a bfloat16. The second moment is stored as its logarithm
in uniform steps, because a bfloat16 is too coarse for updates of 1 % of its value. The logarithm is
rounded up or down at random (stochastic rounding), so that small changes are right on average. The
random numbers depend on position and step only.

Axes: P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 512
"""Codes per factor of two. Neighbouring codes differ by 0.14 %, their square roots by 0.07 %."""
LOWEST = -80
"""Base-2 logarithm at code 0; code 0 itself stands for 0. The largest code stands for 2^48."""


def split(exact_P: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 parameters into the nearest bfloat16 and the missing bits, int16.

    >>> high, low = split(torch.tensor([1.0, -3.14159274]))
    >>> high.tolist(), low.tolist()
    ([1.0, -3.140625], [0, 4059])
    """
    bits_P = exact_P.contiguous().view(torch.int32)
    high_P = (bits_P + 0x8000) >> 16
    low_P = bits_P - (high_P << 16)
    return high_P.to(torch.int16).view(torch.bfloat16), low_P.to(torch.int16)


def joined(high_P: Tensor, low_P: Tensor) -> Tensor:
    """Return the float32 parameters from the two parts that `split` returned."""
    bits_P = (high_P.contiguous().view(torch.int16).to(torch.int32) << 16) + low_P
    return bits_P.view(torch.float32)


def encoded_square(square_P: Tensor) -> Tensor:
    """Return the nearest codes, int16, of non-negative values."""
    return _coded(((square_P.log2() - LOWEST) * STEPS).round())


def decoded_square(code_P: Tensor) -> Tensor:
    """Return the values of codes, float32."""
    code_P = _unsigned(code_P)
    return torch.where(code_P == 0, 0.0, _value(code_P))


def stepped_square(
    code_P: Tensor, beta2: float, gradient_P: Tensor, uniform_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the second moment after one more gradient, float32, and its codes.

    ``uniform_P`` holds random numbers in [0, 1), which decide whether to round up or down. The code
    changes by the logarithm of the ratio of new to old value: the logarithm of the new value alone
    is too imprecise for a small change.
    """
    square_P = beta2 * decoded_square(code_P) + (1 - beta2) * gradient_P.square()
    code_P = _unsigned(code_P)
    steps_P = ((square_P / _value(code_P)).log2() * STEPS + uniform_P).floor()
    return square_P, _coded(code_P + steps_P)


def _value(code_P: Tensor) -> Tensor:
    return torch.exp2(code_P / STEPS + LOWEST)


def _unsigned(code_P: Tensor) -> Tensor:
    return code_P.to(torch.int32) & 0xFFFF


def _coded(number_P: Tensor) -> Tensor:
    """Return numbers from 0 to 65535 as codes, int16."""
    return number_P.clamp(0, 0xFFFF).to(torch.int32).to(torch.int16)


def draws(count: int, step: int) -> Tensor:
    """Return random numbers in [0, 1), float32, that depend on position and step only."""
    x_P = (torch.arange(count, dtype=torch.int64) + step * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x_P = ((x_P ^ (x_P >> shift)) * factor) & 0xFFFFFFFF
    return (x_P >> 8).float() / (1 << 24)
