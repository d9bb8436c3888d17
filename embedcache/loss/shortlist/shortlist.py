"""The shortlist: a softmax over the labels of some positions, and a sampled tail.

Axes: N positions, G carry-ons that see them, H hidden, V vocabulary, C columns of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.base.gather import gather_rows
from embedcache.base.head import Head
from embedcache.loss.chunks import plan_chunks
from embedcache.loss.linear_cross_entropy import frozen_head_loss
from embedcache.loss.vocab_subset import VocabSubset

SHORTLIST_ROWS = {"cpu": 512, "cuda": 16_384}
"""Positions that share one shortlist. Fewer have fewer labels, and so fewer columns to compute; but
what is likely at one position is less often the label of another. On a CPU 512 came out nearer the
exact loss than 2,048 did, by three seeds of three."""

COLUMNS = {"cpu": 64, "cuda": 256}
"""The columns of a shortlist are a multiple of this."""

DRAWS, DRAWS_BESIDE_TOP_IDS = 2048, 256
"""Tokens that a shortlist draws, about, if not said otherwise. Few are enough where it holds all
that the base thinks likely."""

FLATTENED = 0.35
"""Power of the mean square by which the tail is drawn. A half is best where the mean is known; one
over a sample knows little of rare tokens, and less than a half trains better."""

FLATTENED_BESIDE_TOP_IDS = 0.7
"""Power of the mean by which the tail is drawn where a shortlist holds what is likely. What is left
varies little at each position; but all of a list see the same draws, and what these change of the
gradient in common is least so: by as many draws little more than half of what the mean square's
would."""

EXPLORED = 0.1
"""Share of the tail's draws that no probability steers, for what the base thought impossible."""


class Shortlist(NamedTuple):
    """A shortlist for N positions: `VocabSubset`, and the place of each label among them."""

    weight_CH: Tensor
    bias_C: Tensor | None
    log_weight_C: Tensor
    index_N: Tensor


class ShortlistSampler:
    """A softmax over the labels of some positions and a sampled tail, which stands for the rest.

    Beside the labels it holds the top ids of each position, where a cache stores them. Of the other
    tokens, v enters with a chance of π_v = min(1, samples · q_v) and is then weighted by 1/π_v
    (systematic sampling, Madow 1949; Horvitz and Thompson 1952), q the `tail_proposal`: the sum
    that the softmax divides by is unbiased, with a variance as small as one draw for all positions
    allows; its logarithm, and so the loss, is biased low by about half the relative variance. Draws
    depend on (seed, step) alone, for one type of device.

    The proposal is on the device that computes; the head may be in host memory: then only a
    shortlist's rows go to the device.
    """

    def __init__(self, head: Head, proposal_V: Tensor, *, samples: int = 2048, seed: int = 0):
        self._head = head
        # A line of all tokens' chances: where each one's piece ends, and how long it is.
        self._end_V = proposal_V.cumsum(dim=0, dtype=torch.float64)
        self._piece_V = proposal_V.double()
        self._samples = samples
        self._numbers = torch.arange(samples, device=proposal_V.device, dtype=torch.float64)
        self._seed = seed
        kind = proposal_V.device.type
        self._rows, self._multiple = (
            of_kind.get(kind, of_kind["cuda"]) for of_kind in (SHORTLIST_ROWS, COLUMNS)
        )

    def cross_entropy(self, x_GNH: Tensor, targets_N: Tensor, *, step: int) -> Tensor:
        """Return the estimated cross-entropy of each position, float32 [G, N], in nats.

        Args:
            x_GNH: embeddings after each of G carry-ons, in the head's dtype.
            targets_N: token ids in [0, V).
            step: numbers the draws.
        """
        return shortlist_cross_entropy(
            x_GNH, self.draw(targets_N, self.generator(step)), self._head
        )

    def generator(self, step: int) -> torch.Generator:
        """Return what a step's shortlists are drawn with, one behind the other."""
        generator = torch.Generator(self._end_V.device)
        return generator.manual_seed(self._seed * 1_000_003 + step)

    def draw(
        self,
        targets_N: Tensor,
        generator: torch.Generator,
        top_ids_NK: Tensor | None = None,
    ) -> list[Shortlist]:
        """Return a shortlist for every so many positions, on the proposal's device.

        ``top_ids_NK``: as a cache stores them (see `embedcache.cache.format.layout.LIKELY`).
        """
        listed = []
        for start in range(0, len(targets_N), self._rows):
            rows = slice(start, start + self._rows)
            targets = held = targets_N[rows]
            if top_ids_NK is not None:
                top_ids = top_ids_NK[rows].flatten()
                held = torch.cat([targets, top_ids[top_ids > 0].long() - 1])
            columns, ids = self.columns(held, generator)
            assert columns.log_weight_C is not None
            index_N = torch.searchsorted(ids, targets)
            listed.append(
                Shortlist(columns.weight_CH, columns.bias_C, columns.log_weight_C, index_N)
            )
        return listed

    def columns(self, held_N: Tensor, generator: torch.Generator) -> tuple[VocabSubset, Tensor]:
        """Return columns of some tokens and a drawn tail, and those tokens' ids.

        The first columns are theirs, in the order of the ids, which is rising.
        """
        head, end_V, device = self._head, self._end_V, self._end_V.device
        held = distinct(held_N, len(end_V))
        # The others' chances on a line, points at equal distances on it, from a random start: a
        # token is drawn if one falls on its piece. That line is all tokens' without the pieces of
        # those held, so a point is looked for behind the ones that were cut out before it.
        cut_out = self._piece_V[held].cumsum(dim=0)
        distance = (end_V[-1] - cut_out[-1]) / self._samples
        start = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
        points = (self._numbers + start).mul_(distance)
        before = torch.searchsorted(end_V[held] - cut_out, points, right=True)
        points += F.pad(cut_out, (1, 0))[before]
        drawn = torch.searchsorted(end_V, points, right=True).clamp_max_(len(end_V) - 1)
        drawn = torch.unique_consecutive(drawn)
        nearest_held = held[torch.searchsorted(held, drawn).clamp_max_(len(held) - 1)]
        drawn = drawn[nearest_held != drawn]  # a sum that is rounded may end on one
        chosen = torch.cat([held, drawn])
        # VocabSubset of no weight: products of one shape are planned once, of each new one anew.
        padding = -len(chosen) % self._multiple
        log_weight_C = F.pad(
            -(self._piece_V[drawn] / distance).clamp_max_(1).log_().float(), (len(held), 0)
        )
        log_weight_C = F.pad(log_weight_C, (0, padding), value=-torch.inf)
        chosen = F.pad(chosen, (0, padding))
        bias = None if head.bias_V is None else gather_rows(head.bias_V[:, None], chosen)[:, 0]
        return VocabSubset(gather_rows(head.weight_VH, chosen), bias, log_weight_C), held


def distinct(ids_N: Tensor, V: int) -> Tensor:
    """Return the ids in [0, V) that there are, rising."""
    if ids_N.device.type != "cpu":
        return torch.unique(ids_N)
    there_V = np.zeros(V, dtype=bool)  # to sort takes a CPU longer
    there_V[ids_N.numpy()] = True
    return torch.from_numpy(np.flatnonzero(there_V))


def cut_shortlists(listed: Sequence[Shortlist], rows: slice) -> list[Shortlist]:
    """Return the shortlists of some of the positions, those of ``rows``."""
    found, first = [], 0
    for one in listed:
        start, stop = max(rows.start - first, 0), rows.stop - first
        if start < len(one.index_N) and stop > 0:
            found.append(one._replace(index_N=one.index_N[start:stop]))
        first += len(one.index_N)
    return found


def shortlist_cross_entropy(
    x_GNH: Tensor, listed: Sequence[Shortlist], head: Head, *, logit_bytes: int | None = None
) -> Tensor:
    """Return the cross-entropy over shortlists that lie on x's device, float32 [G, N], in nats.

    ``logit_bytes`` of logits exist at a time, by default as many as `plan_chunks` thinks good.
    """
    losses = []
    sizes = [len(one.index_N) for one in listed]
    # All of it is not split: the gradient would be copied.
    parts = [x_GNH] if len(sizes) == 1 else x_GNH.split(sizes, dim=1)
    for one, x_GnH in zip(listed, parts, strict=True):
        columns = VocabSubset(one.weight_CH, one.bias_C, one.log_weight_C)
        x_NH, index_N = x_GnH.flatten(0, 1), one.index_N
        index_N = index_N if len(x_GnH) == 1 else index_N.repeat(len(x_GnH))
        C, dtype = len(one.weight_CH), one.weight_CH.dtype
        chunks = plan_chunks(len(x_NH), C, dtype, x_NH.device, budget=logit_bytes)
        loss_N = frozen_head_loss(x_NH, columns, head, index_N, chunks=chunks)
        losses.append(loss_N.view(x_GnH.shape[:2]))
    return torch.cat(losses, dim=1)


def tail_proposal(x_NH: Tensor, head: Head, *, held: float | None = None) -> Tensor:
    """Return q_V, float32, which sums to 1: how likely a shortlist is to draw each token.

    The variance of the sum over a sampled tail is least where a token's chance is as the root of
    the mean square of its probability. ``x_NH`` are embeddings to take that mean over. Where a
    shortlist holds what has a probability of ``held`` or more, it is of the others' mean.
    """
    N, V = len(x_NH), len(head.weight_VH)
    sum_V = torch.zeros(V, device=x_NH.device)
    for rows in plan_chunks(N, V, torch.float32, x_NH.device).of_rows(N):
        chance_nV = torch.softmax(head(x_NH[rows]).float(), dim=1)
        if held is None:
            sum_V += chance_nV.square_().sum(dim=0)
        else:
            sum_V += chance_nV.masked_fill_(chance_nV >= held, 0).sum(dim=0)
    steered_V = sum_V ** (FLATTENED if held is None else FLATTENED_BESIDE_TOP_IDS)
    return (1 - EXPLORED) * steered_V / steered_V.sum() + EXPLORED / V
