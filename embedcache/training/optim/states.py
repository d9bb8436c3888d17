"""The states of AdamW for a stack's parameters, on their device or in host memory.

Axes: K carry-ons, P parameters of one carry-on. The first ``matrices`` parameters of a row belong
to weight matrices; weight decay applies to these only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from embedcache.training.config import TrainConfig
from embedcache.training.optim.lowbit import (
    decoded_square,
    draws,
    encoded_square,
    joined,
    split,
    stepped_square,
)

EXACT, MEAN, SQUARE = "exact", "exp_avg", "exp_avg_sq"
BETA1, EPSILON = 0.9, 1e-8


class StepArguments(NamedTuple):
    """Arguments of a step, each float32 [K], on the device.

    Attributes:
        rate_K: learning rates.
        step_K: numbers of steps taken before.
        skip_K: 1 for carry-ons that are skipped, else 0.
    """

    rate_K: Tensor
    step_K: Tensor
    skip_K: Tensor


class DeviceStates:
    """Both moments in float32, beside float32 parameters."""

    def __init__(self, values_KP: Tensor, configs: Sequence[TrainConfig], matrices: int):
        self._exact_KP = values_KP
        self._mean_KP, self._square_KP = torch.zeros_like(values_KP), torch.zeros_like(values_KP)
        self._configs = list(configs)
        self._parts = [(slice(0, matrices), True), (slice(matrices, values_KP.shape[1]), False)]

    def step(self, gradient_KP: Tensor, arguments: StepArguments) -> None:
        """Take a step with every carry-on that is not skipped."""
        for k, config in enumerate(self._configs):
            for part, decays in self._parts:
                adamw(
                    [self._exact_KP[k, part]],
                    [gradient_KP[k, part]],
                    [self._mean_KP[k, part]],
                    [self._square_KP[k, part]],
                    [],
                    [arguments.step_K[k].clone()],
                    fused=True,
                    capturable=gradient_KP.is_cuda,
                    found_inf=arguments.skip_K[k],
                    amsgrad=False,
                    beta1=BETA1,
                    beta2=config.beta2,
                    lr=arguments.rate_K[k],
                    weight_decay=config.weight_decay if decays else 0.0,
                    eps=EPSILON,
                    maximize=False,
                )

    def row(self, index: int) -> dict[str, Tensor]:
        """Return the states of one carry-on, by name."""
        return {MEAN: self._mean_KP[index], SQUARE: self._square_KP[index]}

    def restore(self, index: int, row: dict[str, Tensor]) -> None:
        """Restore the states that `row` of this class or of `HostStates` returned."""
        self._mean_KP[index], self._square_KP[index] = row[MEAN], row[SQUARE]
        if EXACT in row:
            self._exact_KP[index] = row[EXACT]


class HostStates:
    """States in host memory, 6 bytes per bfloat16 parameter; see `lowbit`.

    A GPU reads and writes them over the bus, in one Triton kernel.
    """

    def __init__(
        self, values_KP: Tensor, exact_KP: Tensor, configs: Sequence[TrainConfig], matrices: int
    ):
        """Split float32 parameters; their bfloat16 halves are written to ``values_KP``."""
        self._values_KP, self._matrices = values_KP, matrices
        pinned = values_KP.is_cuda

        def made(dtype: torch.dtype) -> Tensor:
            return torch.zeros(values_KP.shape, dtype=dtype, pin_memory=pinned)

        self._low_KP, self._mean_KP = made(torch.int16), made(torch.bfloat16)
        self._square_KP = made(torch.int16)
        device = values_KP.device
        self._beta2_K = torch.tensor([config.beta2 for config in configs], device=device)
        self._decay_K = torch.tensor([config.weight_decay for config in configs], device=device)
        self._put(slice(None), exact_KP)

    def _put(self, rows: slice | int, exact_P: Tensor) -> None:
        high_P, low_P = split(exact_P)
        self._values_KP[rows], self._low_KP[rows] = high_P, low_P

    def step(self, gradient_KP: Tensor, arguments: StepArguments) -> None:
        """Take a step with every carry-on that is not skipped."""
        if self._values_KP.is_cuda:
            from embedcache.training.optim.kernels import step_over_bus

            step_over_bus(
                self._values_KP,
                gradient_KP,
                (self._low_KP, self._mean_KP, self._square_KP),
                arguments,
                self._beta2_K,
                self._decay_K,
                self._matrices,
                beta1=BETA1,
                epsilon=EPSILON,
            )
            return
        for k in (~arguments.skip_K.bool()).nonzero().flatten().tolist():
            self._step_row(k, gradient_KP[k].float(), *(float(each[k]) for each in arguments[:2]))

    def _step_row(self, k: int, gradient_P: Tensor, rate: float, step: float) -> None:
        """Take a step with one carry-on in PyTorch; tests compare the kernel with it."""
        beta2 = float(self._beta2_K[k])
        exact_P = joined(self._values_KP[k], self._low_KP[k])
        mean_P = BETA1 * self._mean_KP[k].float() + (1 - BETA1) * gradient_P
        uniform_P = draws(len(gradient_P), int(step))
        square_P, code_P = stepped_square(self._square_KP[k], beta2, gradient_P, uniform_P)
        exact_P[: self._matrices] *= 1 - rate * float(self._decay_K[k])
        root_P = (square_P / (1 - beta2 ** (step + 1))).sqrt() + EPSILON
        exact_P -= rate / (1 - BETA1 ** (step + 1)) * mean_P / root_P
        self._put(k, exact_P)
        self._mean_KP[k], self._square_KP[k] = mean_P, code_P

    def row(self, index: int) -> dict[str, Tensor]:
        """Return the states of one carry-on, by name, in float32 on the host."""
        if self._values_KP.is_cuda:
            torch.cuda.synchronize(self._values_KP.device)
        return {
            EXACT: joined(self._values_KP[index].cpu(), self._low_KP[index]),
            MEAN: self._mean_KP[index].float(),
            SQUARE: decoded_square(self._square_KP[index]),
        }

    def restore(self, index: int, row: dict[str, Tensor]) -> None:
        """Restore the states that `row` of this class or of `DeviceStates` returned.

        If the states lack exact parameters, the parameters on the device are kept.
        """
        if EXACT in row:
            self._put(index, row[EXACT].cpu())
        self._mean_KP[index] = row[MEAN]
        self._square_KP[index] = encoded_square(row[SQUARE].cpu())
