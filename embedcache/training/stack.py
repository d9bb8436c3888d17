"""Carry-ons of one shape that are trained together, by products over all of them.

Axes: K carry-ons, G of them that see the same batch, N wanted positions of a batch, P weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.cache.batch import Batch
from embedcache.carryon.model import CarryOn
from embedcache.device import any_shape_attention
from embedcache.evaluate import FrozenInputs
from embedcache.loss import Listed, cross_entropy, estimate
from embedcache.training.config import TrainConfig
from embedcache.training.flat import FlatAdamW
from embedcache.training.ranks import ALONE, Ranks
from embedcache.training.recipe import PLAIN, Recipe
from embedcache.units import rounded_up

WANTED = 128
"""Positions whose loss is computed are a multiple of this, the last ones for nothing: products of
one shape are planned once, of each new one anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step of one carry-on, or a part of it: what it sees, and its learning rate.

    ``targets`` are those of the whole step, and of all processes.
    """

    batch: Batch
    targets: int
    rate: float


class Stack:
    """K carry-ons of one shape with an optimiser each. What one does never reaches another."""

    def __init__(
        self,
        models: Sequence[CarryOn],
        configs: Sequence[TrainConfig],
        inputs: FrozenInputs,
        recipe: Recipe = PLAIN,
        ranks: Ranks = ALONE,
    ):
        self.model = CarryOn.stack(models)
        self.model.recompute = recipe.recompute
        self._configs = list(configs)
        self._inputs = inputs
        self.recipe = recipe
        self._ranks = ranks
        self.optimizer = FlatAdamW(
            self.model, configs, device=inputs.device, dtype=recipe.dtype, offload=recipe.offload
        )
        self.model.to(inputs.device)
        self._share_K = torch.ones(len(configs), device=inputs.device)

    def keep(self, rows: Sequence[int]) -> Stack:
        """Return a stack of these carry-ons alone, at the state that they are in."""
        kept = Stack(
            [self.alone(k) for k in rows],
            [self._configs[k] for k in rows],
            self._inputs,
            self.recipe,
            self._ranks,
        )
        for new, old in enumerate(rows):
            kept.optimizer.restore(new, self.optimizer.moments(old))
        return kept

    def alone(self, index: int) -> CarryOn:
        """Return a copy of one carry-on."""
        model = CarryOn(self.model.config, self.model.hidden)
        model.load_state_dict(self.model.member(index))
        return model

    def schedule(self, work: Sequence[Work]) -> None:
        """Set the learning rates of a step, and how much each target counts in it.

        A carry-on whose batch has no target stays as it is.
        """
        self.optimizer.schedule([one.rate if one.targets else None for one in work])
        self._share_K.copy_(torch.tensor([1 / max(1, one.targets) for one in work]))

    @any_shape_attention()
    def differentiate(self, work: Sequence[Work], *, more: bool = False) -> Tensor:
        """Take the gradients of a step of every carry-on, or add those of one more part of it.

        Work on the same batch must lie side by side. Returns what this adds to the losses, loss_K:
        means over the targets of the whole step. Without a target a loss is 0.
        """
        loss_K = torch.cat(self._losses(work)) * self._share_K
        self.optimizer.differentiate(loss_K.sum(), more=more)
        return loss_K.detach()

    def finish(self, loss_K: Tensor) -> tuple[Tensor, Tensor]:
        """Move every carry-on by the gradients that were taken; return losses and their norms.

        Gradients and losses are summed over all processes. A carry-on with one that is not finite
        stays as it is.
        """
        self._ranks.sum(self.optimizer.gradient_KP)
        loss_K = self._ranks.sum(loss_K)
        norm_K = self.optimizer.clip()
        self.optimizer.step(loss_K, norm_K)
        return loss_K, norm_K

    def _losses(self, work: Sequence[Work]) -> list[Tensor]:
        """Return the sums of losses loss_G of each run of carry-ons that see one batch."""
        groups = [list(group) for _, group in groupby(work, key=lambda one: id(one.batch))]
        together = groups[0][0].batch if len(groups) == 1 else stacked_batch(work)
        h_KBTR = self._inputs.features(self.model, together)
        K, B, T, _ = h_KBTR.shape
        # As many positions of each, the last ones for nothing.
        most = max(len(group[0].batch.targets_N) for group in groups)
        place_KN = torch.cat(
            [
                _wanted(group[0].batch, T, rounded_up(most, WANTED)).expand(len(group), -1)
                for group in groups
            ]
        )
        row_KN = place_KN + B * T * torch.arange(K, device=place_KN.device)[:, None]
        h_KNR = h_KBTR.flatten(0, 2).index_select(0, row_KN.flatten()).unflatten(0, (K, -1))
        delta_KNH = self._inputs.emit(self.model, h_KNR.unsqueeze(1)).squeeze(1)
        losses, first = [], 0
        for group in groups:
            batch, delta_GNH = group[0].batch, delta_KNH[first : first + len(group)]
            N = len(batch.targets_N)
            if N:
                wanted_N = F.pad(batch.wanted_N, (0, -N % WANTED))
                x_BTH = batch.x_BTH["final"]
                x_NH = x_BTH.flatten(0, 1).index_select(0, wanted_N).to(self._inputs.dtype)
                loss_GN = self._loss(x_NH + delta_GNH[:, : len(wanted_N)], batch)
                counted = loss_GN[:, :N] if batch.counts_N is None else loss_GN * batch.counts_N
                losses.append(counted.sum(dim=1))
            else:
                losses.append(delta_GNH[:, :0].sum(dim=(1, 2)).float())
            first += len(group)
        return losses

    def _loss(self, y_GNH: Tensor, batch: Batch) -> Tensor:
        """Return loss_GN of embeddings after the carry-ons; by shortlists where some were drawn.

        There are more embeddings than targets by what `WANTED` says.
        """
        head, listed = self._inputs.head, list(cast("Sequence[Listed]", batch.drawn))
        padding = (0, y_GNH.shape[1] - len(batch.targets_N))
        if listed:
            listed[-1] = listed[-1]._replace(index_N=F.pad(listed[-1].index_N, padding))
            return estimate(y_GNH, listed, head, logit_bytes=self.recipe.logit_bytes)
        y_NH, targets_N = y_GNH.flatten(0, 1), F.pad(batch.targets_N, padding).repeat(len(y_GNH))
        chunks = self.recipe.chunks(head, len(targets_N), targets_N.device)
        return cross_entropy(y_NH, head, targets_N, chunks=chunks).view(y_GNH.shape[:2])


def _wanted(batch: Batch, T: int, count: int) -> Tensor:
    """Return a batch's wanted positions in rows of T tokens, filled up to so many."""
    own_T = batch.ids_BT.shape[1]
    place_N = batch.wanted_N
    if own_T != T:
        place_N = place_N // own_T * T + place_N % own_T
    return F.pad(place_N, (0, count - len(place_N)))


def stacked_batch(work: Sequence[Work]) -> Batch:
    """Return the batches of K carry-ons as one, padded to [K, B, T]; wanted positions are left out.

    Padding is as `Batch` has it: embeddings of zero, in segment -1.
    """
    batches = [one.batch for one in work]
    B = max(batch.ids_BT.shape[0] for batch in batches)
    T = max(batch.ids_BT.shape[1] for batch in batches)

    def stacked(parts: list[Tensor], fill: int) -> Tensor:
        out = parts[0].new_full((len(parts), B, T, *parts[0].shape[2:]), fill)
        for row, part in zip(out, parts, strict=True):
            row[: part.shape[0], : part.shape[1]] = part
        return out

    return replace(
        batches[0],
        packed=any(batch.packed for batch in batches),
        x_BTH={tap: stacked([b.x_BTH[tap] for b in batches], 0) for tap in batches[0].x_BTH},
        ids_BT=stacked([batch.ids_BT for batch in batches], 0),
        positions_BT=stacked([batch.positions_BT for batch in batches], 0),
        segments_BT=stacked([batch.segments_BT for batch in batches], -1),
        starts_M=_stacked_starts(batches, T),
    )


def _stacked_starts(batches: Sequence[Batch], T: int) -> Tensor | None:
    """Return starts_KM of batches of one row; what pads a row is a sequence of its own."""
    starts = [batch.starts_M for batch in batches if batch.starts_M is not None]
    if not starts:
        return None
    most = 1 + max(len(starts_M) for starts_M in starts)
    return torch.stack([F.pad(starts_M, (0, most - len(starts_M)), value=T) for starts_M in starts])
