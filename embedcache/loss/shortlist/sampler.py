"""Draws shortlists: the labels of some positions, their top ids and a sampled tail.

Axes: N positions, n positions of a shortlist, G carry-ons that share a batch, H hidden, V
vocabulary, C columns of the softmax, J top ids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.base.gather import gather_rows
from embedcache.base.head import Head
from embedcache.loss.shortlist.shortlist import Shortlist, shortlist_cross_entropy
from embedcache.loss.tiles import VocabSubset

POSITIONS = {"cpu": 512, "cuda": 16_384}
"""Positions that share a shortlist. Fewer positions have fewer labels, and so fewer columns to
compute; but a token that is likely at one position is less often the label of another. On a CPU,
512 came out nearer to the exact loss than 2,048 for three seeds of three."""

COLUMN_MULTIPLE = {"cpu": 64, "cuda": 256}
"""The number of columns is padded to a multiple of this, so that few shapes occur."""

DRAWS, DRAWS_BESIDE_TOP_IDS = 2048, 256
"""Default number of tail draws. Few are enough where a shortlist holds all tokens that the base
thinks likely."""


class ShortlistSampler:
    """Draws a subset of the vocabulary whose softmax estimates the softmax over all of it.

    A shortlist holds the labels of its positions and, where a cache stores them, the base's top ids
    there. Any other token v enters with probability π_v = min(1, samples · q_v), with q the
    `tail_proposal`, and is weighted by 1/π_v (systematic sampling, Madow 1949; Horvitz and Thompson
    1952). The estimate of the softmax's denominator is unbiased, with a variance as small as one
    draw for all positions allows; its logarithm, and so the loss, is biased low by about half the
    relative variance.

    Draws depend on (seed, step) alone, for one type of device. The proposal is on the device that
    computes; of a head in host memory only the rows of a shortlist are copied there.

    Args:
        head: the base's head.
        proposal_V: q, from `tail_proposal`.
        samples: number of tail draws of a shortlist.
        seed: seed of the draws.
    """

    def __init__(self, head: Head, proposal_V: Tensor, *, samples: int = DRAWS, seed: int = 0):
        self._head = head
        # The tokens' intervals on a line: where each one ends, and how long it is.
        self._end_V = proposal_V.cumsum(dim=0, dtype=torch.float64)
        self._length_V = proposal_V.double()
        self._samples = samples
        self._numbers = torch.arange(samples, device=proposal_V.device, dtype=torch.float64)
        self._seed = seed
        device_type = proposal_V.device.type
        self._positions = POSITIONS.get(device_type, POSITIONS["cuda"])
        self._multiple = COLUMN_MULTIPLE.get(device_type, COLUMN_MULTIPLE["cuda"])

    def cross_entropy(self, x_GNH: Tensor, targets_N: Tensor, *, step: int) -> Tensor:
        """Return the estimated cross-entropy of each position, float32 [G, N], in nats.

        Args:
            x_GNH: embeddings after each of G carry-ons, in the head's dtype.
            targets_N: token ids in [0, V).
            step: number of the draws.
        """
        return shortlist_cross_entropy(
            x_GNH, self.draw(targets_N, self.generator(step)), self._head
        )

    def generator(self, step: int) -> torch.Generator:
        """Return the generator that a step's shortlists are drawn with, one after the other."""
        generator = torch.Generator(self._end_V.device)
        return generator.manual_seed(self._seed * 1_000_003 + step)

    def draw(
        self,
        targets_N: Tensor,
        generator: torch.Generator,
        top_ids_NJ: Tensor | None = None,
    ) -> list[Shortlist]:
        """Return a shortlist for each `POSITIONS` positions, on the proposal's device.

        Args:
            targets_N: token ids in [0, V).
            generator: from `generator`.
            top_ids_NJ: as a cache stores them (see `embedcache.cache.format.layout.LIKELY`).
        """
        shortlists = []
        for start in range(0, len(targets_N), self._positions):
            positions = slice(start, start + self._positions)
            targets_n = held = targets_N[positions]
            if top_ids_NJ is not None:
                top_ids = top_ids_NJ[positions].flatten()
                held = torch.cat([targets_n, top_ids[top_ids > 0].long() - 1])
            subset, ids = self.columns(held, generator)
            assert subset.log_weight_C is not None
            index_n = torch.searchsorted(ids, targets_n)
            shortlists.append(
                Shortlist(subset.weight_CH, subset.bias_C, subset.log_weight_C, index_n)
            )
        return shortlists

    def columns(self, held_N: Tensor, generator: torch.Generator) -> tuple[VocabSubset, Tensor]:
        """Return the columns of some tokens and of a sampled tail, and those tokens' ids.

        The ids are distinct and ascending; their columns come first, in the same order.
        """
        head, end_V, device = self._head, self._end_V, self._end_V.device
        held = distinct(held_N, len(end_V))
        # Systematic sampling: points at equal distances from a random start, on the line of all
        # tokens' intervals without those held; a token is drawn if a point lies on its interval.
        # The line is not built. A point is moved by the held intervals before it instead.
        removed = self._length_V[held].cumsum(dim=0)
        distance = (end_V[-1] - removed[-1]) / self._samples
        start = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
        points = (self._numbers + start).mul_(distance)
        before = torch.searchsorted(end_V[held] - removed, points, right=True)
        points += F.pad(removed, (1, 0))[before]
        drawn = torch.searchsorted(end_V, points, right=True).clamp_max_(len(end_V) - 1)
        drawn = torch.unique_consecutive(drawn)
        nearest_held = held[torch.searchsorted(held, drawn).clamp_max_(len(held) - 1)]
        drawn = drawn[nearest_held != drawn]  # rounding may put a point on a held interval
        chosen = torch.cat([held, drawn])
        padding = -len(chosen) % self._multiple  # columns of weight 0
        log_weight_C = F.pad(
            -(self._length_V[drawn] / distance).clamp_max_(1).log_().float(), (len(held), 0)
        )
        log_weight_C = F.pad(log_weight_C, (0, padding), value=-torch.inf)
        chosen = F.pad(chosen, (0, padding))
        bias_C = None if head.bias_V is None else gather_rows(head.bias_V[:, None], chosen)[:, 0]
        weight_CH = gather_rows(head.weight_VH, chosen)
        return VocabSubset(weight_CH, bias_C, log_weight_C, head.logit_scale, head.softcap), held


def distinct(ids_N: Tensor, V: int) -> Tensor:
    """Return the distinct ids, each in [0, V), ascending."""
    if ids_N.device.type != "cpu":
        return torch.unique(ids_N)
    present_V = np.zeros(V, dtype=bool)  # faster than to sort
    present_V[ids_N.numpy()] = True
    return torch.from_numpy(np.flatnonzero(present_V))
