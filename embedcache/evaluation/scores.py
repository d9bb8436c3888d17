"""Scores by document, their differences with an interval, and the table of an evaluation.

Axes: A values of α, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of `embedcache.evaluate`. Cross-entropies are in nats a token.

    Attributes:
        carryon: the carry-on's folder.
        on: the cache or the texts.
        split: the split of the cache, or ``all``.
        live: whether embeddings came from the live base.
        documents: number of documents with a target.
        targets: number of targets.
        rows: by α ``cross_entropy``, ``perplexity``, and the ``difference`` from the base with the
            ends ``low`` and ``high`` of its 95 % interval.
    """

    carryon: str
    on: str
    split: str
    live: bool
    documents: int
    targets: int
    base_cross_entropy: float
    base_perplexity: float
    rows: tuple[dict[str, float], ...]

    def __str__(self) -> str:
        """Return the figures as lines of text."""
        lines = [f"base: {self.base_cross_entropy:.4f} nats a token ({self.targets:,} targets)"]
        lines += [
            f"carry-on, alpha {row['alpha']:g}: {row['cross_entropy']:.4f} "
            f"({row['difference']:+.4f}, 95 % interval [{row['low']:+.4f}, {row['high']:+.4f}])"
            for row in self.rows
        ]
        return "\n".join(lines)


def summarise(scores: Scores, *, carryon: str, on: str, split: str, live: bool) -> Evaluation:
    """Return the table of an evaluation. Documents without targets do not count in the interval."""
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


def with_base(alphas: Sequence[float]) -> tuple[float, ...]:
    """Return the values of α, each once, with 0 (the base) first."""
    return (0.0, *dict.fromkeys(alpha for alpha in alphas if alpha != 0))
