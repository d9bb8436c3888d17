"""Compare a carry-on with its base on held-out text: from a cache, or with the live base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embedcache.errors import UsageError
from embedcache.evaluation.scores import Evaluation
from embedcache.progress import SILENT, Progress

Source = str | Path


def evaluate(
    carryon: str | Path,
    cache: str | Path | None = None,
    *,
    corpus: Source | Sequence[Source] | None = None,
    split: str = "test",
    alphas: float | Sequence[float] = 1.0,
    live: bool = False,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> Evaluation:
    """Compare a carry-on with its base on held-out text.

    Cross-entropies are exact (the whole vocabulary, every target) and in nats a token. The
    difference has a bootstrap 95 % interval over documents.

    Args:
        carryon: folder of the carry-on.
        cache: a cache of the same base; its embeddings are used, and the base is not loaded.
        corpus: texts instead of a cache. They are rendered and cut as the carry-on's own corpus
            was, and the live base computes their embeddings.
        split: split of the cache.
        alphas: one or several values of the rescale dial α.
        live: whether the live base computes the embeddings of the cache's tokens anew.
        base: where the base is now, if it has moved since the carry-on was trained.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: dtype of the live base.
        progress: receives the stages.

    Raises:
        IdentityError: if the cache, the carry-on and the base loaded do not belong to one base.
        UsageError: unless exactly one of ``cache`` and ``corpus`` is given.
    """
    if (cache is None) == (corpus is None):
        raise UsageError("expected either `cache=` or `corpus=`, found both or none")
    alphas = (alphas,) if isinstance(alphas, int | float) else tuple(alphas)
    if cache is not None and not live:
        from embedcache.evaluation.cached import evaluate_cached

        return evaluate_cached(
            Path(carryon), Path(cache), split=split, alphas=alphas, device=device, progress=progress
        )
    from embedcache.base.load import load_base
    from embedcache.carryon.saving import read_record
    from embedcache.evaluation.live import evaluate_cache_live, evaluate_corpus, trained_corpus

    record = read_record(Path(carryon))
    loaded = load_base(str(base or record.base["name"]), device=device, dtype=dtype)
    if cache is not None:
        return evaluate_cache_live(
            loaded, Path(carryon), Path(cache), split=split, alphas=alphas, progress=progress
        )
    sources = (corpus,) if isinstance(corpus, str | Path) else corpus or ()
    config = trained_corpus(record, tuple(map(str, sources)))
    return evaluate_corpus(loaded, Path(carryon), config, alphas=alphas, progress=progress)
