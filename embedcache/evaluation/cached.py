"""Cross-entropy of a carry-on on a split of a cache, without the base.

Always exact: the softmax runs over the whole vocabulary, at every target.

Axes: A values of α, D documents, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from embedcache.base.identity import BaseIdentity
from embedcache.cache.cache import Cache
from embedcache.carryon.protocol import CarryOn, predicted_embeddings
from embedcache.carryon.saving import load_carryon
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.device import any_shape_attention, resolve_device
from embedcache.evaluation.scores import EVAL_TOKENS, Evaluation, Scores, summarise, with_base
from embedcache.loss import linear_cross_entropy
from embedcache.progress import SILENT, Progress


@torch.no_grad()
@any_shape_attention()
def score(
    batches: Iterable[Batch],
    frozen: FrozenInputs,
    model: CarryOn,
    alphas: Sequence[float],
    documents: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Return the exact cross-entropy of every document at every α, in one pass over the batches."""
    loss_AD = np.zeros((len(alphas), documents))
    targets_D = np.zeros(documents, np.int64)
    for batch in batches:
        if not len(batch.targets_N):
            continue
        np.add.at(targets_D, batch.documents_N, 1)
        for row, alpha in enumerate(alphas):
            y_NH = predicted_embeddings(model, batch, frozen, alpha)
            loss_N = linear_cross_entropy(y_NH, frozen.head, batch.targets_N)
            np.add.at(loss_AD[row], batch.documents_N, loss_N.double().cpu().numpy())
        on_batch(batch.tokens)
    return Scores(tuple(alphas), loss_AD, targets_D)


def evaluate_cached(
    carryon: Path,
    cache_path: Path,
    *,
    split: str = "test",
    alphas: Sequence[float] = (1.0,),
    device: str = "auto",
    progress: Progress = SILENT,
) -> Evaluation:
    """Compare a carry-on with its base on a split of a cache, from the cache alone.

    Raises ``IdentityError`` if the cache and the carry-on belong to different bases.
    """
    model, record = load_carryon(carryon)
    cache = Cache(cache_path)
    BaseIdentity.from_dict(cache.attributes.base).require(
        BaseIdentity.from_dict(record.base),
        this=f"the cache {cache_path}",
        that=f"the carry-on {carryon}",
    )
    cache.require_taps(record.config.taps)
    reader = cache.split(split)
    target = resolve_device(device)
    loader = BatchLoader(
        reader,
        batch_tokens=EVAL_TOKENS,
        taps=record.config.taps,
        shuffle=False,
        device=target,
    )
    with progress.bar(f"evaluating on {split}", reader.manifest.tokens, "tok") as bar:
        scores = score(
            loader.epoch(0),
            FrozenInputs(cache, target, arrays=record.config.base_arrays),
            model.to(target),
            with_base(alphas),
            reader.manifest.documents,
            bar.advance,
        )
    return summarise(scores, carryon=str(carryon), on=str(cache_path), split=split, live=False)
