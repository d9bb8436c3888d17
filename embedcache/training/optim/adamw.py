"""AdamW for a stack of carry-ons. One matrix holds all parameters, another all gradients.

Axes: K carry-ons, P parameters of one carry-on. A row holds weight matrices first, then vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from embedcache.carryon.nn.linear import GRADIENT_BUFFER, LOW_PRECISION_COPY
from embedcache.carryon.protocol import CarryOn
from embedcache.training.config import TrainConfig
from embedcache.training.optim.states import DeviceStates, HostStates, StepArguments


class StackAdamW:
    """AdamW with weight decay on matrices only, applied to each carry-on of a stack separately.

    The stack's parameters become views of ``values_KP``, and their gradients views of
    ``gradient_KP``, so that the gradient of a carry-on is clipped, checked and summed over
    processes as one row. Both matrices are float32, or bfloat16 if the states are in host memory.
    The optimiser updates float32 parameters in either case. If products use another dtype, the
    optimiser keeps a copy of all parameters in that dtype.
    """

    def __init__(
        self,
        stack: CarryOn,
        configs: Sequence[TrainConfig],
        *,
        device: torch.device | None = None,
        offload: bool = False,
        low: torch.dtype | None = None,
    ):
        """Move a stack's parameters to one matrix.

        Args:
            stack: the carry-ons, on the host.
            configs: the configuration of each carry-on.
            device: where parameters and gradients are kept.
            offload: whether the states are in host memory.
            low: dtype of the products that use the parameters.
        """
        parameters = sorted(stack.named_parameters(), key=lambda one: -min(one[1].ndim, 3))
        sizes = [parameter[0].numel() for _, parameter in parameters]
        matrices = sum(s for (_, p), s in zip(parameters, sizes, strict=True) if p.ndim > 2)
        exact_KP = torch.cat([parameter.detach().flatten(1) for _, parameter in parameters], dim=1)
        dtype = torch.bfloat16 if offload else torch.float32
        self.values_KP = exact_KP.to(dtype).to(device)
        self.gradient_KP = torch.zeros_like(self.values_KP)
        self._low_KP = None if low in (None, dtype) else self.values_KP.to(low)
        start = 0
        for (name, parameter), size in zip(parameters, sizes, strict=True):
            part = slice(start, start + size)
            value = nn.Parameter(self.values_KP[:, part].view(parameter.shape))
            gradient = self.gradient_KP[:, part].view(parameter.shape)
            value.register_post_accumulate_grad_hook(partial(_accumulate, gradient))
            setattr(value, GRADIENT_BUFFER, gradient)
            if self._low_KP is not None:
                setattr(value, LOW_PRECISION_COPY, self._low_KP[:, part].view(parameter.shape))
            layer, _, attribute = name.rpartition(".")
            setattr(stack.get_submodule(layer), attribute, value)
            start += size
        self._states: DeviceStates | HostStates
        if offload:
            self._states = HostStates(self.values_KP, exact_KP, configs, matrices)
        else:
            self._states = DeviceStates(self.values_KP, configs, matrices)
        # The arguments of a step are on the device, so that a CUDA graph can replay the step.
        device = self.values_KP.device
        self._clip_K = torch.tensor([config.clip for config in configs], device=device)
        self._arguments_2K, (self._step_K, self._broken_K) = torch.zeros(
            2, 2, len(configs), device=device
        )
        self._rate_K, self._skip_K = self._arguments_2K

    def clip(self) -> Tensor:
        """Clip the gradient norm of each carry-on; return norm_K, the norms before clipping."""
        norm_K = self.gradient_KP.norm(dim=1, dtype=torch.float32)
        self.gradient_KP *= (self._clip_K / (norm_K + 1e-6)).clamp_max(1.0)[:, None]
        return norm_K

    def schedule(self, rates: Sequence[float | None]) -> None:
        """Set each carry-on's learning rate; None skips a carry-on in the next step."""
        due = [[rate or 0.0 for rate in rates], [float(rate is None) for rate in rates]]
        send(due, self._arguments_2K)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Skip every carry-on in all steps inside the ``with`` block."""
        skip_K, broken_K = self._skip_K.clone(), self._broken_K.clone()
        self._skip_K.fill_(1.0)
        try:
            yield
        finally:
            self._skip_K.copy_(skip_K)
            self._broken_K.copy_(broken_K)

    @torch.no_grad()
    def step(self, *seen: Tensor) -> None:
        """Take a step at the rates that `schedule` set.

        ``seen`` holds tensors [K], such as losses and gradient norms. A carry-on with a value that
        is not finite is skipped in this step and all later ones.
        """
        for seen_K in seen:
            self._broken_K.masked_fill_(~seen_K.isfinite(), 1.0)
        skip_now_K = torch.maximum(self._skip_K, self._broken_K)
        self._states.step(self.gradient_KP, StepArguments(self._rate_K, self._step_K, skip_now_K))
        self._step_K += 1.0 - skip_now_K
        self._follow()

    def _follow(self) -> None:
        """Update the low-precision copy of the parameters."""
        if self._low_KP is not None:
            self._low_KP.copy_(self.values_KP)

    def moments(self, index: int) -> dict[str, Tensor]:
        """Return the states of one carry-on, by name; empty before its first step."""
        if not self._step_K[index]:
            return {}
        return self._states.row(index) | {"step": self._step_K[index].clone()}

    def restore(self, index: int, moments: dict[str, Tensor]) -> None:
        """Restore the states that `moments` of this optimiser or another returned."""
        if not moments:
            return
        self._step_K[index] = moments["step"]
        self._states.restore(index, moments)
        self._follow()


def send(values: Sequence[float] | Sequence[Sequence[float]], to: Tensor) -> None:
    """Copy values to a device tensor of the same shape, without waiting for the copy."""
    to.copy_(torch.tensor(values, pin_memory=to.is_cuda), non_blocking=True)


def _accumulate(gradient: Tensor, parameter: Tensor) -> None:
    """Add a parameter's gradient to its buffer and free it at once, to save memory.

    The gradient is None if the product has already added it to the buffer.
    """
    if parameter.grad is not None:
        gradient.add_(parameter.grad)
        parameter.grad = None


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Return the learning rate after the fraction ``progress`` of all tokens.

    The rate rises linearly over the fraction ``warmup``, then falls to 0 along a cosine.

    >>> [round(learning_rate(p, peak=1.0, warmup=0.5), 3) for p in (0.25, 0.5, 0.75, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return peak * progress / warmup
    along = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * along))
