"""The shortlist: a softmax over the tokens that matter to a batch.

Axes: N positions, H hidden, V vocabulary, C columns of the softmax, K likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss.columns import Columns
from embedcache.loss.frozen import frozen_head_loss


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
        self, x_NH: Tensor, targets_N: Tensor, likely_NK: Tensor, *, step: int
    ) -> Tensor:
        """Return the estimated cross-entropy of each position, float32 [N], in nats."""
        columns, index_V = self.columns(targets_N, likely_NK, step=step)
        return frozen_head_loss(x_NH, columns, self._head, index_V[targets_N])

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
