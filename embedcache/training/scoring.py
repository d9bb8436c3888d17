"""Exact cross-entropy of stacked carry-ons on held-out batches, for choosing epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from embedcache.cache.loader import Batch
from embedcache.carryon.model import CarryOn
from embedcache.device import any_shape_attention
from embedcache.evaluate import FrozenInputs
from embedcache.loss import cross_entropy


@torch.no_grad()
@any_shape_attention()
def mean_losses(
    batches: Iterable[Batch],
    inputs: FrozenInputs,
    stack: CarryOn | None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> list[float]:
    """Return the mean cross-entropy of each of K carry-ons, in nats a token; one pass over batches.

    Without a ``stack``, that of the base, as a list of one.
    """
    sums: list[float] = []
    targets = 0
    for batch in batches:
        if not len(batch.targets_N):
            continue
        x_NH = batch.at_wanted(batch.x_BTH["final"]).to(inputs.dtype)
        if stack is None:
            found = [x_NH]
        else:
            delta_KNH = inputs.delta(stack, batch).flatten(1, 2).index_select(1, batch.wanted_N)
            found = [x_NH + delta_NH.to(inputs.dtype) for delta_NH in delta_KNH]
        losses = [cross_entropy(y, inputs.head, batch.targets_N).double().sum() for y in found]
        sums = [a + b for a, b in zip(sums or [0.0] * len(found), losses, strict=True)]  # type: ignore[misc]
        targets += len(batch.targets_N)
        on_batch(batch.tokens)
    return [float(total) / targets for total in sums]
