"""``embedcache eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from embedcache.errors import UsageError

from . import options
from .show import TerminalProgress, counted, print_json, print_table

EXAMPLES = """
embedcache eval carryon cache --alpha 1 --alpha 0.5
embedcache eval carryon cache --live
embedcache eval carryon --corpus other-docs/
"""


def evaluate_command(
    carryon: Annotated[Path, typer.Argument(help="Folder of a carry-on.", metavar="CARRYON")],
    cache: Annotated[
        Path | None,
        typer.Argument(help="A finished cache of the carry-on's base.", metavar="CACHE"),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="Instead of CACHE: text to run the base on, prepared as for the carry-on's cache; "
            "repeatable.",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Split of CACHE: train, dev or test.",
            autocompletion=options.choices(options.SPLITS),
        ),
    ] = "test",
    alphas: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha",
            help="Strength of the carry-on: 0 is the base alone, 1 as trained; repeatable.",
            show_default="1.0",
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Run the base on CACHE's tokens, not its stored embeddings."),
    ] = False,
    as_json: options.AsJson = False,
    base: options.MovedBase = None,
    device: options.BaseDevice = "auto",
    dtype: options.BaseDtype = "auto",
) -> None:
    """Compare a carry-on with its base on held-out text.

    Prints the cross-entropy per target token, in nats, and the difference with a 95 % confidence
    interval over documents; below 0, the carry-on is better. From a cache, the base is not loaded.
    """
    if (cache is None) == (not corpus):
        raise UsageError(
            "expected a CACHE or --corpus, one of the two, such as: embedcache eval CARRYON CACHE"
        )
    from embedcache.evaluation.evaluate import evaluate

    found = evaluate(
        carryon,
        cache,
        corpus=corpus,
        split=split,
        alphas=alphas or 1.0,
        live=live,
        base=base,
        device=device,
        dtype=dtype,
        progress=TerminalProgress(),
    )
    if as_json:
        print_json(asdict(found))
        return
    how = "with the live base" if found.live else "from the cache"
    typer.echo(
        f"{found.on}, {found.split}: {counted(found.documents, 'documents')}, "
        f"{counted(found.targets, 'targets')}, {how}\n"
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
