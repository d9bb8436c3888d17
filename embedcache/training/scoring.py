"""Exact cross-entropy of stacked carry-ons on dev, by which the best epoch is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from embedcache.carryon.protocol import CarryOn, predicted_embeddings
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs
from embedcache.device import any_shape_attention
from embedcache.loss import ShortlistSampler, linear_cross_entropy, shortlist_cross_entropy
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.step.settings import PLAIN, StepSettings


class DevLoss(NamedTuple):
    """A carry-on's cross-entropy on held-out text, in nats a token.

    ``estimate`` is the same cross-entropy, estimated by the shortlists of training; ``estimate`` -
    ``exact`` is the shortlists' bias. It is None if training uses the exact loss.
    """

    exact: float
    estimate: float | None = None


@torch.no_grad()
@any_shape_attention()
def dev_losses(
    batches: Iterable[Batch],
    inputs: FrozenInputs,
    stack: CarryOn | None,
    shortlist: ShortlistSampler | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
    ranks: Ranks = ALONE,
    settings: StepSettings = PLAIN,
) -> list[DevLoss]:
    """Return the loss of each of K carry-ons, in one pass over batches with at least one target.

    Without a ``stack``, the list holds the base's loss only. Each process of ``ranks`` passes its
    own share of the batches.
    """
    K = 1 if stack is None else stack.count
    exact_K, estimate_K = torch.zeros(2, K, dtype=torch.float64)
    targets = 0
    for step, batch in enumerate(batches):
        if not len(batch.targets_N):
            continue
        y_KNH = predicted_embeddings(stack, batch, inputs)
        if stack is None:
            y_KNH = y_KNH[None]
        for k, y_NH in enumerate(y_KNH):
            chunks = settings.chunks(inputs.head, len(y_NH), y_NH.device)
            loss_N = linear_cross_entropy(y_NH, inputs.head, batch.targets_N, chunks=chunks)
            exact_K[k] += loss_N.double().sum().cpu()
        if shortlist is not None:
            generator = shortlist.generator(step)
            listed = shortlist.draw(batch.targets_N, generator, batch.top_ids_NJ)
            loss_KN = shortlist_cross_entropy(
                y_KNH, listed, inputs.head, logit_bytes=settings.logit_bytes
            )
            estimate_K += loss_KN.double().sum(dim=1).cpu()
        targets += len(batch.targets_N)
        on_batch(batch.tokens)
    counted = torch.tensor(targets, dtype=torch.float64)
    for sums in (exact_K, estimate_K, counted):
        ranks.sum(sums)
    targets = int(counted)
    return [
        DevLoss(exact / targets, None if shortlist is None else estimate / targets)
        for exact, estimate in zip(exact_K.tolist(), estimate_K.tolist(), strict=True)
    ]
