"""The weights of a stack, and their gradients, each as one matrix; and AdamW on its rows.

Axes: K carry-ons, P weights of one. A row holds the matrices first, then the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from embedcache.carryon.nn.linear import GRADIENT_BUFFER, LOW_PRECISION_COPY
from embedcache.carryon.protocol import CarryOn
from embedcache.errors import CarryOnError
from embedcache.training.config import TrainConfig
from embedcache.training.optim.states import DeviceStates, Due, HostStates


class FlatAdamW:
    """AdamW with weight decay on matrices only, every carry-on of a stack for itself.

    The stack's parameters become views of ``values_KP``, and their gradients of ``gradient_KP``,
    so that a carry-on's is clipped, checked or summed over processes at once. Both are float32;
    where the optimiser's states are in host memory, bfloat16, and the weights exact all the same.
    Where products take ``low`` precision, the weights are kept in that, too, one copy of them all.
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
        """Take over a stack's weights, on ``device``, and keep states there or on the host.

        What is not kept is never on the device: build the stack on the host.
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
            value.register_post_accumulate_grad_hook(partial(_move, gradient))
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
        # All that a step depends on is on the device, so that it can be captured and replayed.
        device = self.values_KP.device
        self._clip_K = torch.tensor([config.clip for config in configs], device=device)
        self._due_2K, (self._taken_K, self._broken_K) = torch.zeros(
            2, 2, len(configs), device=device
        )
        self._rate_K, self._idle_K = self._due_2K

    def clip(self) -> Tensor:
        """Scale each carry-on's gradient to its largest norm; return norm_K before that."""
        norm_K = self.gradient_KP.norm(dim=1, dtype=torch.float32)
        self.gradient_KP *= (self._clip_K / (norm_K + 1e-6)).clamp_max(1.0)[:, None]
        return norm_K

    def schedule(self, rates: Sequence[float | None]) -> None:
        """Set each carry-on's learning rate; None leaves that one as it is in the next step."""
        due = [[rate or 0.0 for rate in rates], [float(rate is None) for rate in rates]]
        send(due, self._due_2K)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Leave every carry-on as it is, whatever is stepped."""
        idle_K, broken_K = self._idle_K.clone(), self._broken_K.clone()
        self._idle_K.fill_(1.0)
        try:
            yield
        finally:
            self._idle_K.copy_(idle_K)
            self._broken_K.copy_(broken_K)

    @torch.no_grad()
    def step(self, *seen: Tensor) -> None:
        """Take a step at the rates that were set.

        A carry-on of which any of the values ``seen``, each [K], is not finite stays as it is, from
        now on.
        """
        for seen_K in seen:
            self._broken_K.masked_fill_(~seen_K.isfinite(), 1.0)
        still_K = torch.maximum(self._idle_K, self._broken_K)
        self._states.step(self.gradient_KP, Due(self._rate_K, self._taken_K, still_K))
        self._taken_K += 1.0 - still_K
        self._follow()

    def _follow(self) -> None:
        """Bring what is kept in low precision to what the weights are."""
        if self._low_KP is not None:
            self._low_KP.copy_(self.values_KP)

    def moments(self, index: int) -> dict[str, Tensor]:
        """Return what AdamW keeps of one carry-on, by name; empty before its first step."""
        if not self._taken_K[index]:
            return {}
        return self._states.row(index) | {"step": self._taken_K[index].clone()}

    def restore(self, index: int, moments: dict[str, Tensor]) -> None:
        """Take back what `moments` returned, here or there."""
        if not moments:
            return
        if "step" not in moments:
            raise CarryOnError(
                "the checkpoint was made by an earlier version: delete its folder and train again"
            )
        self._taken_K[index] = moments["step"]
        self._states.restore(index, moments)
        self._follow()


def send(values: Sequence[float] | Sequence[Sequence[float]], to: Tensor) -> None:
    """Copy values to a tensor on the device, of their shape; the host does not wait for that."""
    to.copy_(torch.tensor(values, pin_memory=to.is_cuda), non_blocking=True)


def _move(gradient: Tensor, parameter: Tensor) -> None:
    """Add a parameter's gradient to where it belongs at once, so that few exist twice.

    There is none if a product added it itself.
    """
    if parameter.grad is not None:
        gradient.add_(parameter.grad)
        parameter.grad = None
