"""The weights of a stack, and their gradients, each as one matrix; and AdamW on its rows.

Axes: K carry-ons, P weights of one. A row holds the matrices first, then the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedcache.carryon.model import CarryOn
from embedcache.training.config import TrainConfig


class FlatAdamW:
    """AdamW with weight decay on matrices only, every carry-on of a stack for itself.

    The stack's parameters become views of ``values_KP``, and their gradients are gathered in
    ``gradient_KP``, so that a carry-on's is clipped, checked or summed over processes at once.
    """

    def __init__(self, stack: CarryOn, configs: Sequence[TrainConfig]):
        parameters = sorted(stack.parameters(), key=lambda parameter: -min(parameter.ndim, 3))
        sizes = [parameter[0].numel() for parameter in parameters]
        matrices = sum(s for p, s in zip(parameters, sizes, strict=True) if p.ndim > 2)
        first = parameters[0]
        self.values_KP = torch.empty(len(configs), sum(sizes), device=first.device)
        self.gradient_KP = torch.zeros_like(self.values_KP)
        self._parameters, self._gradients = parameters, []
        start = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            part = slice(start, start + size)
            self.values_KP[:, part] = parameter.detach().flatten(1)
            parameter.data = self.values_KP[:, part].view(parameter.shape)
            self._gradients.append(self.gradient_KP[:, part].view(parameter.shape))
            start += size
        self._parts = (slice(0, matrices), slice(matrices, start))
        groups = [
            {
                "params": [self.values_KP[k, part]],
                "weight_decay": config.weight_decay if part is self._parts[0] else 0.0,
                "betas": (0.9, config.beta2),
            }
            for k, config in enumerate(configs)
            for part in self._parts
        ]
        self._clip_K = torch.tensor([config.clip for config in configs], device=first.device)
        self._adamw = torch.optim.AdamW(groups, fused=True)

    def differentiate(self, loss: Tensor) -> None:
        """Set the gradients to those of ``loss``."""
        torch._foreach_copy_(self._gradients, torch.autograd.grad(loss, self._parameters))

    def clip(self) -> Tensor:
        """Scale each carry-on's gradient to its largest norm; return norm_K before that."""
        norm_K = self.gradient_KP.norm(dim=1)
        self.gradient_KP *= (self._clip_K / (norm_K + 1e-6)).clamp_max(1.0)[:, None]
        return norm_K

    def step(self, rates: Sequence[float | None]) -> None:
        """Take one step at each carry-on's learning rate; None leaves that one as it is."""
        for index, group in enumerate(self._adamw.param_groups):
            k, part = index // 2, self._parts[index % 2]
            rate = rates[k]
            group["params"][0].grad = None if rate is None else self.gradient_KP[k, part]
            group["lr"] = 0.0 if rate is None else rate
        self._adamw.step()

    def moments(self, index: int) -> dict[str, Tensor]:
        """Return what AdamW keeps of one carry-on, by name; empty before its first step."""
        found: dict[str, Tensor] = {}
        for number, group in enumerate(self._adamw.param_groups[2 * index : 2 * index + 2]):
            state = self._adamw.state.get(group["params"][0], {})
            found |= {f"{number}.{name}": value for name, value in state.items()}
        return found

    def restore(self, index: int, moments: dict[str, Tensor]) -> None:
        """Take back what `moments` returned."""
        for number, group in enumerate(self._adamw.param_groups[2 * index : 2 * index + 2]):
            values = group["params"][0]
            state = {
                name.removeprefix(f"{number}."): value.to(values.device, copy=True)
                for name, value in moments.items()
                if name.startswith(f"{number}.")
            }
            if state:
                self._adamw.state[values] = state
