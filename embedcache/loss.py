"""Cross-entropy through a frozen head.

No gradient of the head is ever computed, and logits exist for one chunk of positions at a time: the
gradient of the embedding is taken in the forward pass, so nothing is recomputed (4·N·C·H FLOPs).

Axes: N positions, H hidden, V vocabulary, C columns of the softmax (V, or those of a shortlist),
K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedcache.base.head import Head

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes of float32 logits held at a time. On a CPU small enough to stay near the caches."""


def cross_entropy(x_NH: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Return the exact cross-entropy of each position, float32 [N], in nats.

    Args:
        x_NH: embeddings after the carry-on, in the head's dtype; may require a gradient.
        head: the base's frozen head.
        targets_N: token ids in [0, V).
    """
    columns = Columns(head.weight_VH, head.bias_V, None)
    return _frozen_head_loss(x_NH, columns, head, targets_N)


@dataclass(frozen=True, slots=True)
class Columns:
    """The tokens a softmax runs over: their head rows, biases and log-weights.

    ``weight_CH``; ``bias_C`` or None; ``log_weight_C``, added to the logits, or None.
    """

    weight_CH: Tensor
    bias_C: Tensor | None
    log_weight_C: Tensor | None


class Shortlist:
    """A softmax over the tokens that matter to a batch, plus a sampled tail.

    S holds the batch's labels and the base's K likeliest tokens of each of its positions, so that
    it has nearly all of the probability; ``samples`` tokens are drawn uniformly from the other
    V - |S|, without replacement, and each stands for (V - |S|) / samples of them. The sum that the
    softmax divides by is thus unbiased; its logarithm, and so the loss, is biased low by about half
    the estimate's relative variance. Draws depend on (seed, step) alone.
    """

    def __init__(self, head: Head, *, samples: int = 1024, seed: int = 0):
        self._head = head
        self._samples = samples
        self._seed = seed

    def cross_entropy(
        self, x_GNH: Tensor, targets_N: Tensor, likely_NK: Tensor, *, step: int
    ) -> Tensor:
        """Return the estimated cross-entropy of each position, float32 [G, N], in nats.

        Args:
            x_GNH: embeddings after each of G carry-ons, in the head's dtype.
            targets_N: token ids in [0, V).
            likely_NK: the base's likeliest tokens of each position.
            step: numbers the draw.
        """
        columns, index_V = self.columns(targets_N, likely_NK, step=step)
        targets = index_V[targets_N].repeat(len(x_GNH))
        loss_N = _frozen_head_loss(x_GNH.flatten(0, 1), columns, self._head, targets)
        return loss_N.view(x_GNH.shape[:2])

    def columns(self, targets_N: Tensor, likely_NK: Tensor, *, step: int) -> tuple[Columns, Tensor]:
        """Return the columns of a step and, by token id, the place of each of S among them."""
        head = self._head
        V = head.weight_VH.shape[0]
        listed_V = torch.zeros(V, dtype=torch.bool, device=targets_N.device)
        listed_V[targets_N] = True
        listed_V[likely_NK.flatten()] = True
        listed = listed_V.nonzero().squeeze(1)
        others = (~listed_V).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        samples = min(self._samples, len(others))
        drawn = torch.randperm(len(others), generator=generator)[:samples]
        tail = others[drawn.to(others.device)]
        chosen = torch.cat([listed, tail])
        log_weight = torch.zeros(len(chosen), device=chosen.device)
        if samples:
            log_weight[len(listed) :] = torch.log(torch.tensor(len(others) / samples))
        index_V = torch.empty(V, dtype=torch.long, device=chosen.device)
        index_V[chosen] = torch.arange(len(chosen), device=chosen.device)
        bias = None if head.bias_V is None else head.bias_V[chosen]
        return Columns(head.weight_VH[chosen], bias, log_weight), index_V


def _frozen_head_loss(x_NH: Tensor, columns: Columns, head: Head, targets_N: Tensor) -> Tensor:
    apply: Any = _FrozenHeadLoss.apply  # torch leaves it untyped
    loss: Tensor = apply(x_NH, columns, head.logit_scale, head.softcap, targets_N)
    return loss


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        columns: Columns,
        scale: float,
        softcap: float | None,
        targets_N: Tensor,
    ) -> Tensor:
        weight_CH = columns.weight_CH
        loss_N = torch.empty(len(x_NH), dtype=torch.float32, device=x_NH.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_NH = torch.empty_like(x_NH) if needs_gradient else None
        for rows in row_chunks(len(x_NH), weight_CH.shape[0], x_NH.device):
            targets = targets_N[rows, None]
            logits = x_NH[rows] @ weight_CH.T
            # Float32 from here on; where nothing is added, the cast is log_softmax's own.
            if columns.bias_C is not None:
                logits = logits.float() + columns.bias_C
            if scale != 1.0:
                logits = logits.float() * scale
            if softcap is not None:
                capped = torch.tanh(logits.float() / softcap)
                logits = capped * softcap
            if columns.log_weight_C is not None:
                logits = logits.float() + columns.log_weight_C
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            loss_N[rows] = -log_p.gather(1, targets).squeeze(1)
            if gradient_NH is None:
                continue
            slope = log_p.exp_()  # the softmax, in place
            slope.scatter_add_(1, targets, slope.new_full(targets.shape, -1.0))
            if softcap is not None:
                slope *= 1 - capped.square()
            if scale != 1.0:
                slope *= scale
            gradient_NH[rows] = slope.to(weight_CH.dtype) @ weight_CH
        if gradient_NH is not None:
            ctx.save_for_backward(gradient_NH)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * gradients[0][:, None].to(gradient_NH.dtype), None, None, None, None


def likeliest(x_NH: Tensor, head: Head, count: int) -> Tensor:
    """Return the ``count`` likeliest tokens of each position under the head, int64 [N, count].

    The likeliest come first. ``count`` must not be above the vocabulary's size.
    """
    found = torch.empty(len(x_NH), count, dtype=torch.long, device=x_NH.device)
    for rows in row_chunks(len(x_NH), head.weight_VH.shape[0], x_NH.device):
        found[rows] = head(x_NH[rows]).topk(count, dim=1).indices
    return found


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Cut rows into chunks whose float32 logits stay under ``CHUNK_BYTES`` of the device."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    size = max(1, budget // (4 * columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
