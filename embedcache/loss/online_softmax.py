"""The softmax of each position over the columns seen so far.

Axes: R positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Running:
    """What a position's softmax needs of the tiles that went by; updated in place.

    ``peak_R``, the largest logit, or one that is near enough to it for exp; ``total_R``, the sum of
    exp(logit - peak); ``label_R``, the label's logit, NaN until its tile comes by.
    """

    peak_R: Tensor
    total_R: Tensor
    label_R: Tensor

    @classmethod
    def start(cls, rows: int, dtype: torch.dtype, device: torch.device) -> Running:
        """Return the softmax of no columns."""
        # A finite floor: columns of -inf alone (banned tokens) must not give inf - inf.
        floor = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return cls(floor, torch.zeros_like(floor), torch.full_like(floor, torch.nan))

    def of(self, rows: slice) -> Running:
        """Return a view of some positions."""
        return Running(self.peak_R[rows], self.total_R[rows], self.label_R[rows])

    def cross_entropy(self) -> Tensor:
        """Return -log p(label) of each position, [R]."""
        return (self.peak_R - self.label_R) + self.total_R.log()  # a small sum keeps its digits
