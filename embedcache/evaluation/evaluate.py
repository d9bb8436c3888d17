"""Cross-entropy of the base and of a carry-on, from a cache or with the live base.

Always exact: the whole head, every target. Axes: A values of α, D documents, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.base.gather import gather_rows
from embedcache.base.head import Head
from embedcache.base.identity import BaseIdentity
from embedcache.cache.cache import Cache
from embedcache.carryon.branch.model import CarryOn
from embedcache.carryon.nn.attention import Spans, segment_mask
from embedcache.carryon.saving import load_carryon
from embedcache.data.batch import Batch
from embedcache.data.loader import BatchLoader
from embedcache.device import any_shape_attention, resolve_device, resolve_dtype
from embedcache.errors import CacheError
from embedcache.loss import linear_cross_entropy
from embedcache.progress import SILENT, Progress

Array = np.ndarray[Any, Any]

EVAL_TOKENS = 8192
"""Tokens of an evaluation batch."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Summed cross-entropy by α and document, in nats: loss_AD float64, targets_D int64."""

    alphas: tuple[float, ...]
    loss_AD: Array
    targets_D: Array

    def mean(self, alpha: float) -> float:
        """Return the cross-entropy at α in nats a token."""
        return float(self.loss_AD[self.alphas.index(alpha)].sum() / self.targets_D.sum())

    def difference(self, alpha: float, *, samples: int = 2000, seed: int = 0) -> Difference:
        """Return carry-on minus base with a bootstrap 95 % interval over documents."""
        change_D = self.loss_AD[self.alphas.index(alpha)] - self.loss_AD[self.alphas.index(0.0)]
        generator = np.random.default_rng(seed)
        count = len(change_D)
        means = np.empty(samples)
        for sample in range(samples):
            drawn = generator.integers(count, size=count)
            means[sample] = change_D[drawn].sum() / self.targets_D[drawn].sum()
        low, high = np.quantile(means, [0.025, 0.975])
        return Difference(float(change_D.sum() / self.targets_D.sum()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of cross-entropies in nats a token, and its 95 % interval."""

    value: float
    low: float
    high: float


class FrozenInputs:
    """What stage two uses of the base: its head and token embedding, on one device.

    ``dtype`` is theirs, and that of a carry-on's products; by default that of exact figures:
    float32 on a CPU, and bfloat16, as the base itself runs, on a GPU. With ``host_head`` they stay
    in host memory.
    """

    def __init__(
        self,
        cache: Cache,
        device: torch.device,
        *,
        tokens: bool,
        dtype: torch.dtype | None = None,
        host_head: bool = False,
    ):
        dtype = dtype or resolve_dtype("auto", device)
        pinned = host_head and device.type == "cuda"
        home = torch.device("cpu") if host_head else device

        def placed(value: torch.Tensor) -> torch.Tensor:
            value = value.to(home, dtype)
            return value.pin_memory() if pinned else value

        weight = cache.base_array("head/weight")
        if weight is None:
            raise CacheError(f"{cache.path} holds no head: its 'base' is missing. Extract again.")
        bias = cache.base_array("head/bias")
        self.head = Head.from_parts(
            placed(weight),
            None if bias is None else placed(bias),
            cache.head_settings(),
        )
        self._embedding_VH: torch.Tensor | None = None
        if tokens:
            embedding = cache.base_array("token_embedding/weight")
            self._embedding_VH = self.head.weight_VH if embedding is None else placed(embedding)
        self.device, self.dtype = device, dtype
        self._longest = cache.attributes.settings.context

    def tensors(self) -> list[torch.Tensor]:
        """Return the head's weight and, where it is another, the token embedding."""
        found = [self.head.weight_VH]
        if self._embedding_VH is not None and self._embedding_VH is not found[0]:
            found.append(self._embedding_VH)
        return found

    def tokens_BTH(self, ids_BT: torch.Tensor) -> torch.Tensor | None:
        """Return the base's token embedding of ids, where the carry-on reads them."""
        if self._embedding_VH is None:
            return None
        tokens_NH = gather_rows(self._embedding_VH, ids_BT.flatten())
        return tokens_NH.view(*ids_BT.shape, -1)

    def features(self, model: CarryOn, batch: Batch) -> torch.Tensor:
        """Return the features h_(K)BTR of a carry-on, or a stack, on a batch."""
        where: torch.Tensor | Spans | None = None
        if batch.cu_seqlens_M is not None:
            # Batches of several rows, one a carry-on, end in padding that may be longer.
            longest = self._longest if batch.cu_seqlens_M.ndim == 1 else batch.ids_BT.shape[-1]
            where = Spans(batch.cu_seqlens_M, max(self._longest, longest))
        elif batch.packed:
            where = segment_mask(batch.segments_BT)
        with self._products():
            return model.features(
                {tap: x.to(self.dtype) for tap, x in batch.x_BTH.items()},
                positions_BT=batch.positions_BT,
                tokens_BTH=self.tokens_BTH(batch.ids_BT),
                where=where,
            )

    def emit(self, model: CarryOn, h_BTR: torch.Tensor) -> torch.Tensor:
        """Return the delta_(K)BTH of features, in the dtype of the head."""
        with self._products():
            return model.emit(h_BTR).to(self.dtype)

    def delta(self, model: CarryOn, batch: Batch) -> torch.Tensor:
        """Return the delta_(K)NH of a batch's wanted positions; of others none is made."""
        h_KBTR = self.features(model, batch)
        h_KNR = h_KBTR.flatten(-3, -2).index_select(-2, batch.predict_N)
        return self.emit(model, h_KNR.unsqueeze(-3)).squeeze(-3)

    def _products(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


@torch.no_grad()
@any_shape_attention()
def score(
    batches: Iterable[Batch],
    inputs: FrozenInputs,
    model: CarryOn,
    alphas: Sequence[float],
    documents: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Return the exact cross-entropy of every document at every α; one pass over the batches."""
    loss_AD = np.zeros((len(alphas), documents))
    targets_D = np.zeros(documents, np.int64)
    for batch in batches:
        if not len(batch.targets_N):
            continue
        x_NH = batch.at_predicted(batch.x_BTH["final"]).to(inputs.dtype)
        needs_delta = any(alpha != 0 for alpha in alphas)
        delta_NH = inputs.delta(model, batch) if needs_delta else None
        document_N = batch.documents_N
        np.add.at(targets_D, document_N, 1)
        for row, alpha in enumerate(alphas):
            y_NH = x_NH if delta_NH is None or alpha == 0 else x_NH + alpha * delta_NH
            loss_N = linear_cross_entropy(y_NH, inputs.head, batch.targets_N)
            np.add.at(loss_AD[row], document_N, loss_N.double().cpu().numpy())
        on_batch(batch.tokens)
    return Scores(tuple(alphas), loss_AD, targets_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `evaluate` found, ready for a table or JSON."""

    carryon: str
    on: str
    split: str
    live: bool
    documents: int
    targets: int
    base_cross_entropy: float
    base_perplexity: float
    rows: tuple[dict[str, float], ...]
    """By α: cross_entropy, perplexity, difference, low, high."""


def summarise(scores: Scores, *, carryon: str, on: str, split: str, live: bool) -> Evaluation:
    """Return the table of an evaluation; documents without targets are left out of the interval."""
    seen = scores.targets_D > 0
    scores = Scores(scores.alphas, scores.loss_AD[:, seen], scores.targets_D[seen])
    rows = []
    for alpha in scores.alphas:
        if alpha == 0:
            continue
        mean, difference = scores.mean(alpha), scores.difference(alpha)
        rows.append(
            {
                "alpha": alpha,
                "cross_entropy": mean,
                "perplexity": math.exp(mean),
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
            }
        )
    base = scores.mean(0.0)
    return Evaluation(
        carryon=carryon,
        on=on,
        split=split,
        live=live,
        documents=int(seen.sum()),
        targets=int(scores.targets_D.sum()),
        base_cross_entropy=base,
        base_perplexity=math.exp(base),
        rows=tuple(rows),
    )


def evaluate(
    carryon: Path,
    cache_path: Path,
    *,
    split: str = "test",
    alphas: Sequence[float] = (1.0,),
    device: str = "auto",
    progress: Progress = SILENT,
) -> Evaluation:
    """Compare a carry-on with its base on a split of a cache, from the cache alone.

    Raises ``IdentityError`` where cache and carry-on are of different bases.
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
    inputs = FrozenInputs(cache, target, tokens=record.config.token_input)
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
            inputs,
            model.to(target),
            with_base(alphas),
            reader.manifest.documents,
            bar.advance,
        )
    return summarise(scores, carryon=str(carryon), on=str(cache_path), split=split, live=False)


def with_base(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return the values of α, each once, with 0 (the base) first."""
    return (0.0, *dict.fromkeys(alpha for alpha in alphas if alpha != 0))
