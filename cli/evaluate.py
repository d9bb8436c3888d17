"""``embedcache eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from embedcache.errors import UsageError

from .show import TerminalProgress, print_json, print_table


def evaluate_command(
    carryon: Annotated[Path, typer.Argument(help="A carry-on.")],
    cache: Annotated[Path | None, typer.Argument(help="A cache with a test split.")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on instead, with the live base.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the cache.")] = "test",
    alpha: Annotated[list[float] | None, typer.Option(help="The dial; may be repeated.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Recompute the cache's embeddings with the base.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base, where it is not found as it was named.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of the live base.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a carry-on with its base."""
    if (cache is None) == (not corpus):
        raise UsageError(
            "expected a cache or --corpus, one of the two: embedcache eval CARRYON CACHE"
        )
    alphas = tuple(alpha or (1.0,))
    progress = TerminalProgress()
    from embedcache.evaluation.evaluate import evaluate

    found = evaluate(
        carryon,
        cache,
        corpus=corpus,
        split=split,
        alphas=alphas,
        live=live,
        base=base,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    if as_json:
        print_json(asdict(found))
        return
    how = "live base" if found.live else "from the cache"
    typer.echo(
        f"{found.on}, {found.split}: {found.documents:,} documents, "
        f"{found.targets:,} targets, {how}"
    )
    rows = [["base", f"{found.base_cross_entropy:.4f}", f"{found.base_perplexity:.3f}", "", ""]]
    rows += [
        [
            f"carry-on, alpha {row['alpha']:g}",
            f"{row['cross_entropy']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['difference']:+.4f}",
            f"[{row['low']:+.4f}, {row['high']:+.4f}]",
        ]
        for row in found.rows
    ]
    print_table(["", "cross-entropy", "perplexity", "difference", "95 % interval"], rows)
