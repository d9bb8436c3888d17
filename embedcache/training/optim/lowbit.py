"""Numbers of the optimiser in 16 bits.

A weight is two halves: a bfloat16, which computes, and the 16 bits by which its float32 is off
that, so that nothing of it is lost. A mean of gradients is a bfloat16. A mean of squares is the
logarithm of it, with one step over its whole range: a bfloat16 is too coarse to be moved by a
hundredth of itself. It is rounded up or down by chance, so that it follows on average however
little it is moved; chance depends on place and step alone.

Axes: P weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 512
"""Codes of an octave: neighbours are 0.14 % apart, their roots half as much."""
LOWEST = -80
"""The logarithm, to base 2, of what code 0 would be; it stands for 0. The largest is 2^48."""


def split(exact_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of float32 weights: bfloat16, the nearest, and int16.

    >>> high, low = split(torch.tensor([1.0, -3.14159274]))
    >>> high.tolist(), low.tolist()
    ([1.0, -3.140625], [0, 4059])
    """
    bits_P = exact_P.contiguous().view(torch.int32)
    high_P = (bits_P + 0x8000) >> 16
    low_P = bits_P - (high_P << 16)
    return high_P.to(torch.int16).view(torch.bfloat16), low_P.to(torch.int16)


def joined(high_P: Tensor, low_P: Tensor) -> Tensor:
    """Return the float32 weights of two halves."""
    bits_P = (high_P.contiguous().view(torch.int16).to(torch.int32) << 16) + low_P
    return bits_P.view(torch.float32)


def encoded_square(square_P: Tensor) -> Tensor:
    """Return the codes, int16, nearest to values that are 0 or more."""
    return _coded(((square_P.log2() - LOWEST) * STEPS).round())


def decoded_square(code_P: Tensor) -> Tensor:
    """Return the values, float32, of codes."""
    code_P = _unsigned(code_P)
    return torch.where(code_P == 0, 0.0, _value(code_P))


def stepped_square(
    code_P: Tensor, beta2: float, slope_P: Tensor, chance_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a mean of squares after one more, float32, and its codes.

    Chances in [0, 1) round up or down. Codes move by the logarithm of a ratio: that of the value
    has not the digits of a small step.
    """
    square_P = beta2 * decoded_square(code_P) + (1 - beta2) * slope_P.square()
    code_P = _unsigned(code_P)
    steps_P = ((square_P / _value(code_P)).log2() * STEPS + chance_P).floor()
    return square_P, _coded(code_P + steps_P)


def _value(code_P: Tensor) -> Tensor:
    return torch.exp2(code_P / STEPS + LOWEST)


def _unsigned(code_P: Tensor) -> Tensor:
    return code_P.to(torch.int32) & 0xFFFF


def _coded(number_P: Tensor) -> Tensor:
    """Return numbers as codes: half of those that have no sign are negative as int16."""
    return number_P.clamp(0, 0xFFFF).to(torch.int32).to(torch.int16)


def draws(count: int, step: int) -> Tensor:
    """Return a number in [0, 1) for each place, float32: the same for the same place and step."""
    x_P = (torch.arange(count, dtype=torch.int64) + step * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x_P = ((x_P ^ (x_P >> shift)) * factor) & 0xFFFFFFFF
    return (x_P >> 8).float() / (1 << 24)
