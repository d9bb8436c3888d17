"""The same evaluation with the live base: every embedding computed anew, through `compose`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.forward import plan_batches
from embedcache.base.identity import BaseIdentity
from embedcache.base.load import Base
from embedcache.base.taps import final_embeddings
from embedcache.cache.cache import Cache
from embedcache.compose.model import Composed, compose
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.reader import CorpusReader
from embedcache.device import any_shape_attention
from embedcache.evaluation.evaluate import EVAL_TOKENS, Evaluation, Scores, summarise, with_base
from embedcache.loss import linear_cross_entropy
from embedcache.progress import SILENT, Bar, Progress

Array = np.ndarray[Any, Any]
Sequences = Iterable[list[tuple[int, Array, Array]]]
"""Groups of (document, ids [T], loss_mask [T])."""


def evaluate_cache_live(
    base: Base,
    carryon: Path,
    cache_path: Path,
    *,
    split: str = "test",
    alphas: Sequence[float] = (1.0,),
    progress: Progress = SILENT,
) -> Evaluation:
    """Compare carry-on and base on a cache's tokens, with embeddings of the live base.

    Raises ``IdentityError`` where base, cache and carry-on are not all of one base.
    """
    cache = Cache(cache_path)
    BaseIdentity.from_dict(cache.attributes.base).require(
        base.identity, this=f"the cache {cache_path}", that="the base"
    )
    reader = cache.split(split)
    with (
        compose(base, carryon) as composed,
        progress.bar(f"evaluating on {split}, live", reader.manifest.tokens, "tok") as bar,
    ):
        scores = _score(base, composed, _cached(reader), with_base(alphas), bar)
    return summarise(scores, carryon=str(carryon), on=str(cache_path), split=split, live=True)


def evaluate_corpus(
    base: Base,
    carryon: Path,
    corpus: CorpusConfig,
    *,
    alphas: Sequence[float] = (1.0,),
    progress: Progress = SILENT,
) -> Evaluation:
    """Compare carry-on and base on all documents of a corpus, from its text."""
    reader = CorpusReader(corpus, base.tokenizer)
    with (
        compose(base, carryon) as composed,
        progress.bar("evaluating, live", None, "tok") as bar,
    ):
        scores = _score(base, composed, _read(reader), with_base(alphas), bar)
    on = ", ".join(corpus.sources)
    return summarise(scores, carryon=str(carryon), on=on, split="all", live=True)


def _cached(reader: Any) -> Sequences:
    for block in range(reader.manifest.blocks):
        ids_N, mask_N = reader.tokens(block)
        _, rows_S2, document_S = reader.sequences(block)
        yield [
            (int(document), ids_N[a:b], mask_N[a:b])
            for document, (a, b) in zip(document_S, rows_S2.tolist(), strict=True)
        ]


def _read(reader: CorpusReader) -> Sequences:
    group: list[tuple[int, Array, Array]] = []
    for document in reader:
        group += [(document.index, s.ids.astype(np.int64), s.loss_mask) for s in document.sequences]
        if sum(len(ids) for _, ids, _ in group) >= 4 * EVAL_TOKENS:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
@any_shape_attention()
def _score(
    base: Base, composed: Composed, groups: Sequences, alphas: tuple[float, ...], bar: Bar
) -> Scores:
    losses: dict[int, Array] = {}
    targets: dict[int, int] = {}
    composed.alpha = 1.0
    for document, ids_T, x_TH, delta_TH, mask_T in _forward(base, composed, groups):
        wanted = torch.from_numpy(np.flatnonzero(mask_T[1:])).to(base.device)
        labels_N = torch.from_numpy(ids_T[1:][mask_T[1:]]).to(base.device)
        bar.advance(len(ids_T))
        if not len(labels_N):
            continue
        x_NH, delta_NH = x_TH[wanted], delta_TH[wanted]
        summed_A = np.array(
            [
                linear_cross_entropy(
                    x_NH + alpha * delta_NH if alpha else x_NH, base.head, labels_N
                )
                .double()
                .sum()
                .item()
                for alpha in alphas
            ]
        )
        losses[document] = losses.get(document, np.zeros(len(alphas))) + summed_A
        targets[document] = targets.get(document, 0) + len(labels_N)
    order = sorted(losses)
    loss_AD = np.stack([losses[d] for d in order], axis=1) if order else np.zeros((len(alphas), 0))
    return Scores(alphas, loss_AD, np.array([targets[d] for d in order], dtype=np.int64))


def _forward(
    base: Base, composed: Composed, groups: Sequences
) -> Iterator[tuple[int, Array, torch.Tensor, torch.Tensor, Array]]:
    """Yield (document, ids_T, x_TH, delta_TH, loss_mask_T) of every sequence."""
    for group in groups:
        lengths = [len(ids) for _, ids, _ in group]
        for batch in plan_batches(lengths, EVAL_TOKENS):
            ids_BT = np.zeros((len(batch), lengths[batch[0]]), np.int64)
            for b, index in enumerate(batch):
                ids_BT[b, : lengths[index]] = group[index][1]
            final_embeddings(base.model, torch.from_numpy(ids_BT).to(base.device))
            x_BTH, delta_BTH = composed.x_BTH, composed.delta_BTH
            if x_BTH is None or delta_BTH is None:
                raise RuntimeError("the composed model's forward left no embeddings")
            for b, index in enumerate(batch):
                document, ids, mask = group[index]
                yield document, ids, x_BTH[b, : len(ids)], delta_BTH[b, : len(ids)], mask
