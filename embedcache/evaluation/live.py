"""Cross-entropy of a carry-on composed with the live base, which computes every embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.forward import plan_batches
from embedcache.base.identity import BaseIdentity
from embedcache.base.load import Base
from embedcache.base.taps import final_embeddings
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import corpora_of
from embedcache.carryon.saving import CarryOnRecord
from embedcache.compose.model import ComposedModel, compose
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.reader import CorpusReader
from embedcache.device import any_shape_attention
from embedcache.errors import UsageError
from embedcache.evaluation.scores import EVAL_TOKENS, Evaluation, Scores, summarise, with_base
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
    """Compare carry-on and base on the tokens of a cache, with embeddings of the live base.

    Raises ``IdentityError`` if the cache or the carry-on belongs to another base.
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


def trained_corpus(record: CarryOnRecord, sources: tuple[str, ...]) -> CorpusConfig:
    """Return other texts, to be rendered and cut as those that a carry-on was trained on.

    Raises ``UsageError`` for a carry-on whose texts were rendered in several ways.
    """
    first, *others = [
        replace(
            CorpusConfig.from_dict(part["config"]),
            sources=sources,
            dev_sources=(),
            test_sources=(),
            split_file=None,
            dev_fraction=0.0,
            test_fraction=0.0,
            limit_documents=None,
            limit_tokens=None,
        )
        for part in corpora_of(record.cache["corpus"])
    ]
    if any(other != first for other in others):
        raise UsageError(
            "this carry-on was trained on texts that were rendered in several ways, expected one. "
            "Extract these texts and pass the result as `cache=`."
        )
    return first


@torch.no_grad()
@any_shape_attention()
def _score(
    base: Base, composed: ComposedModel, groups: Sequences, alphas: tuple[float, ...], bar: Bar
) -> Scores:
    """Return the scores at every α. Each α except 0 takes its own forward pass."""
    losses: dict[int, Array] = {}
    targets: dict[int, int] = {}
    passes = [alpha for alpha in alphas if alpha != 0] or [1.0]
    for batch in _batches(groups):
        for number, alpha in enumerate(passes):
            composed.alpha = alpha
            y_BTH = final_embeddings(base.model, batch.ids_BT.to(base.device))
            shown = {alpha: y_BTH}
            if number == 0 and 0.0 in alphas:
                shown[0.0] = composed.base_embeddings()
            for b, (document, ids_T, mask_T) in enumerate(batch.sequences):
                labels_N = torch.from_numpy(ids_T[1:][mask_T[1:]]).to(base.device)
                if not len(labels_N):
                    continue
                at_N = torch.from_numpy(np.flatnonzero(mask_T[1:])).to(base.device)
                sums_A = losses.setdefault(document, np.zeros(len(alphas)))
                if number == 0:
                    targets[document] = targets.get(document, 0) + len(labels_N)
                for one, y in shown.items():
                    if one in alphas:
                        loss_N = linear_cross_entropy(y[b, at_N], base.head, labels_N)
                        sums_A[alphas.index(one)] += loss_N.double().sum().item()
        bar.advance(sum(len(ids_T) for _, ids_T, _ in batch.sequences))
    order = sorted(losses)
    loss_AD = np.stack([losses[d] for d in order], axis=1) if order else np.zeros((len(alphas), 0))
    return Scores(alphas, loss_AD, np.array([targets[d] for d in order], dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences of like length, each (document, ids_T, loss_mask_T), and their ids, padded."""

    ids_BT: torch.Tensor
    sequences: list[tuple[int, Array, Array]]


def _batches(groups: Sequences) -> Iterator[_Batch]:
    for group in groups:
        lengths = [len(ids) for _, ids, _ in group]
        for indices in plan_batches(lengths, EVAL_TOKENS):
            ids_BT = np.zeros((len(indices), lengths[indices[0]]), np.int64)
            for b, index in enumerate(indices):
                ids_BT[b, : lengths[index]] = group[index][1]
            yield _Batch(torch.from_numpy(ids_BT), [group[index] for index in indices])
