"""Carry-ons of one shape, trained together: each product is computed for all of them.

Axes: K carry-ons, G carry-ons that share a batch, N predicted positions of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.carryon.protocol import CarryOn, batch_features, stack_of
from embedcache.carryon.registry import build
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs
from embedcache.device import any_shape_attention
from embedcache.loss import (
    linear_cross_entropy,
    shortlist_cross_entropy,
    slice_shortlists,
    split_rows,
)
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.optim.adamw import StackAdamW, send
from embedcache.training.step.settings import PLAIN, StepSettings
from embedcache.training.step.step_inputs import StepInputs
from embedcache.units import round_up

POSITIONS_MULTIPLE = 128
"""Pad the number of predicted positions to a multiple of this, so that products have few shapes:
libraries plan each new shape anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one carry-on in a step, or in a part of one.

    Attributes:
        inputs: the batch and its shortlists.
        targets: number of targets of the whole step, over all processes.
        rate: learning rate of the step.
    """

    inputs: StepInputs
    targets: int
    rate: float


class Stack:
    """K carry-ons of one shape, each with its own optimiser; none affects another."""

    def __init__(
        self,
        models: Sequence[CarryOn],
        configs: Sequence[TrainConfig],
        inputs: FrozenInputs,
        settings: StepSettings = PLAIN,
        ranks: Ranks = ALONE,
    ):
        self.model = stack_of(models)
        self.model.recompute = settings.recompute
        self._configs = list(configs)
        self._inputs = inputs
        self.settings = settings
        self._ranks = ranks
        self.optimizer = StackAdamW(
            self.model, configs, device=inputs.device, offload=settings.offload, low=inputs.dtype
        )
        self.model.to(inputs.device)
        self._share_K = torch.ones(len(configs), device=inputs.device)

    def keep(self, rows: Sequence[int]) -> Stack:
        """Return a stack of some of the carry-ons, with their weights and optimiser states."""
        kept = Stack(
            [self.alone(k) for k in rows],
            [self._configs[k] for k in rows],
            self._inputs,
            self.settings,
            self._ranks,
        )
        for new, old in enumerate(rows):
            kept.optimizer.restore(new, self.optimizer.moments(old))
        return kept

    def alone(self, index: int) -> CarryOn:
        """Return a copy of one carry-on."""
        model = build(self.model.config, self.model.hidden)
        model.load_state_dict(self.model.member(index))
        return model

    def begin(self, work: Sequence[Work]) -> None:
        """Begin a step: set the learning rates and the weight of each carry-on's targets.

        A carry-on whose batch has no target is skipped.
        """
        self.optimizer.schedule([one.rate if one.targets else None for one in work])
        self.optimizer.gradient_KP.zero_()
        send([1 / max(1, one.targets) for one in work], self._share_K)

    @contextmanager
    def zero_weights(self) -> Iterator[None]:
        """Set the weight of all targets to 0 in the block, so that gradients do not change."""
        share_K = self._share_K.clone()
        self._share_K.zero_()
        try:
            yield
        finally:
            self._share_K.copy_(share_K)

    def prepared(self, work: Sequence[Work]) -> Callable[[], Tensor]:
        """Return a function that calls `differentiate` with this work."""
        return partial(self.differentiate, work)

    @any_shape_attention()
    def differentiate(self, work: Sequence[Work]) -> Tensor:
        """Add the gradients of a part of the step to those of every carry-on.

        Args:
            work: the work of each carry-on. Those with the same inputs are next to each other.

        Returns:
            loss_K: the part's share of the mean loss over the targets of the whole step.
        """
        groups = [list(group) for _, group in groupby(work, key=lambda one: id(one.inputs))]
        h_KNR = self._features(groups)
        loss_K = torch.zeros_like(self._share_K)
        gradients = []
        # From here on, positions are independent and H wide: compute some at a time.
        streamed = all(
            self.streams(one.inputs) for one in work
        )  # each chunk streams the whole head
        delta_positions = None if streamed else self.settings.delta_positions
        for rows in split_rows(h_KNR.shape[1], delta_positions or h_KNR.shape[1]):
            h_KnR = h_KNR.detach()[:, rows].requires_grad_()
            part_K = self._losses(groups, h_KnR, rows) * self._share_K
            part_K.sum().backward()
            loss_K += part_K.detach()
            assert h_KnR.grad is not None
            gradients.append(h_KnR.grad)
        if gradients:
            h_KNR.backward(torch.cat(gradients, dim=1))
        return loss_K

    def finish(self, loss_K: Tensor) -> tuple[Tensor, Tensor]:
        """Take the optimiser's step; return losses and gradient norms, [K] each.

        Gradients and losses are summed over all processes. A carry-on whose loss or norm is not
        finite is skipped from then on.
        """
        self._ranks.sum(self.optimizer.gradient_KP)
        loss_K = self._ranks.sum(loss_K)
        norm_K = self.optimizer.clip()
        self.optimizer.step(loss_K, norm_K)
        return loss_K, norm_K

    def ends_alone(self) -> bool:
        """Say whether `finish` needs no other process."""
        return self._ranks.count == 1

    def _features(self, groups: Sequence[list[Work]]) -> Tensor:
        """Return the features h_KNR of the predicted positions, padded to the largest N."""
        batches = [group[0].inputs.batch for group in groups]
        together = batches[0] if len(groups) == 1 else stacked_batch([*chain(*groups)])
        h_KBTR = batch_features(self.model, together, self._inputs)
        K, B, T, _ = h_KBTR.shape
        N = round_up(max(len(batch.targets_N) for batch in batches), POSITIONS_MULTIPLE)
        place_KN = torch.cat(
            [
                _positions(batch, T, N).expand(len(group), -1)
                for group, batch in zip(groups, batches, strict=True)
            ]
        )
        row_KN = place_KN + B * T * torch.arange(K, device=place_KN.device)[:, None]
        return h_KBTR.flatten(0, 2).index_select(0, row_KN.flatten()).unflatten(0, (K, -1))

    def streams(self, inputs: StepInputs) -> bool:
        """Say whether the loss streams the whole head from host memory, tile by tile."""
        return self._inputs.head.weight_VH.device != self._inputs.device and not inputs.shortlists

    def _losses(self, groups: Sequence[list[Work]], h_KnR: Tensor, rows: slice) -> Tensor:
        """Return the sums of losses loss_K over some of the predicted positions."""
        x_KnH = self._final(groups, rows)
        with self._inputs.autocast():
            y_KnH = self.model.embeddings(h_KnR.unsqueeze(1), x_KnH.unsqueeze(-3)).squeeze(1)
        losses = []
        # A single group is not split: a split would copy the gradient.
        alone = len(groups) == 1
        parts = [y_KnH] if alone else y_KnH.split([len(group) for group in groups])
        for group, y_GnH in zip(groups, parts, strict=True):
            inputs, batch = group[0].inputs, group[0].inputs.batch
            here = _rows_of(batch, rows)
            if here.start >= here.stop:
                losses.append(y_GnH[:, :0].sum(dim=(1, 2)).float())
                continue
            loss_Gn = self._loss(y_GnH[:, : here.stop - here.start], inputs, here)
            if inputs.weight_N is None:
                loss_Gn = loss_Gn[:, : max(0, len(batch.targets_N) - here.start)]
            else:
                loss_Gn = loss_Gn * inputs.weight_N[here]
            losses.append(loss_Gn.sum(dim=1))
        return torch.cat(losses)

    def _final(self, groups: Sequence[list[Work]], rows: slice) -> Tensor:
        """Return the final embeddings of some of the predicting positions, x_KnH, or shared x_nH.

        The rows of a batch with fewer positions end in zeros.
        """
        dtype = self._inputs.dtype
        found = []
        for group in groups:
            batch = group[0].inputs.batch
            predict_n = _padded(batch.predict_N)[_rows_of(batch, rows)]
            found.append(batch.x_BTH["final"].flatten(0, 1).index_select(0, predict_n).to(dtype))
        if len(groups) == 1:
            return found[0]
        x_KnH = found[0].new_zeros(sum(map(len, groups)), rows.stop - rows.start, found[0].shape[1])
        first = 0
        for group, x_nH in zip(groups, found, strict=True):
            x_KnH[first : first + len(group), : len(x_nH)] = x_nH
            first += len(group)
        return x_KnH

    def _loss(self, y_GnH: Tensor, inputs: StepInputs, rows: slice) -> Tensor:
        """Return loss_Gn of embeddings after the carry-ons, exact or by shortlists."""
        head, batch, listed = self._inputs.head, inputs.batch, list(inputs.shortlists)
        if listed:
            last = listed[-1]
            more = round_up(len(batch.targets_N), POSITIONS_MULTIPLE) - len(batch.targets_N)
            listed[-1] = last._replace(index_N=F.pad(last.index_N, (0, more)))
            some = slice_shortlists(listed, rows)
            return shortlist_cross_entropy(y_GnH, some, head, logit_bytes=self.settings.logit_bytes)
        y_NH, targets_N = y_GnH.flatten(0, 1), _padded(batch.targets_N)[rows].repeat(len(y_GnH))
        chunks = self.settings.chunks(head, len(targets_N), targets_N.device)
        return linear_cross_entropy(y_NH, head, targets_N, chunks=chunks).view(y_GnH.shape[:2])


def _rows_of(batch: Batch, rows: slice) -> slice:
    """Return the part of ``rows`` that a batch has, if padded to `POSITIONS_MULTIPLE`."""
    return slice(rows.start, min(rows.stop, round_up(len(batch.targets_N), POSITIONS_MULTIPLE)))


def _padded(values_N: Tensor) -> Tensor:
    """Return values of positions, padded with zeros to a multiple of `POSITIONS_MULTIPLE`."""
    return F.pad(values_N, (0, -len(values_N) % POSITIONS_MULTIPLE))


def _positions(batch: Batch, T: int, count: int) -> Tensor:
    """Return a batch's predicted positions in rows of T tokens, padded to ``count``."""
    own_T = batch.ids_BT.shape[1]
    place_N = batch.predict_N
    if own_T != T:
        place_N = place_N // own_T * T + place_N % own_T
    return F.pad(place_N, (0, count - len(place_N)))


def stacked_batch(work: Sequence[Work]) -> Batch:
    """Return the batches of K carry-ons as one, padded to [K, B, T], without predicted positions.

    Padding is that of `Batch`: embeddings of zero, in segment -1.
    """
    batches = [one.inputs.batch for one in work]
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
        cu_seqlens_M=_stacked_boundaries(batches, T),
    )


def _stacked_boundaries(batches: Sequence[Batch], T: int) -> Tensor | None:
    """Return cu_seqlens_KM of batches of one row; the padding of a row is one more sequence."""
    boundaries = [batch.cu_seqlens_M for batch in batches if batch.cu_seqlens_M is not None]
    if not boundaries:
        return None
    most = 1 + max(len(cu_seqlens_M) for cu_seqlens_M in boundaries)
    return torch.stack(
        [F.pad(cu_seqlens_M, (0, most - len(cu_seqlens_M)), value=T) for cu_seqlens_M in boundaries]
    )
