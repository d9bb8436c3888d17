"""Heads, embeddings and targets of odd shapes, and their loss in float64 from all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from embedcache.base.head import Head

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "divisor": {"logit_divisor": 8.0},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
}
SHAPES = [(1, 3, 2), (64, 101, 16)]  # N, V, H


def problem(
    kind: str, N: int, V: int, H: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Return embeddings that require a gradient, a head and targets."""
    draw = torch.Generator().manual_seed(N)
    settings = dict(HEADS[kind])
    bias = torch.randn(V, generator=draw) if settings.pop("bias", False) else None
    weight = torch.randn(V, H, generator=draw).to(device, dtype).requires_grad_()
    x = torch.randn(N, H, generator=draw).to(device, dtype).requires_grad_()
    head = Head(weight, None if bias is None else bias.to(device, dtype), **settings)
    return x, head, torch.randint(V, (N,), generator=draw).to(device)


def reference_logits(x: torch.Tensor, head: Head) -> torch.Tensor:
    """Return all logits in float64."""
    logits = x.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def reference(
    x: torch.Tensor, head: Head, targets: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each position and x's gradient, in float64, by PyTorch's autograd."""
    other = x.detach().double().requires_grad_()
    loss = F.cross_entropy(reference_logits(other, head), targets, reduction="none")
    (loss * upstream.double()).sum().backward()
    assert other.grad is not None
    return loss.detach(), other.grad


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error, by norms."""
    return ((found.double() - expected).norm() / expected.norm()).item()
