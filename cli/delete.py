"""``embedcache delete``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .show import TerminalProgress, print_json


def delete_command(
    cache: Annotated[Path, typer.Argument(help="A finished cache.")],
    document: Annotated[
        list[str], typer.Option(help="Name of a document to delete, as in 'inspect'; repeatable.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take documents out of a cache for good: tokens, byte spans, embeddings and names.

    Every document of the name goes, from all splits, and every piece of a large file that was cut.
    What stays is numbered anew and the manifest has another hash, so that no run that was begun on
    the cache goes on with it. A deletion that was stopped is finished by the same command, and
    until then nothing reads the cache. What was computed of many documents together stays: the
    calibration of the codec transform, carry-ons trained before. So do copies of the cache, and
    the corpus itself.
    """
    from embedcache.editing.delete import delete

    done = delete(cache, document, dry_run=dry_run, progress=TerminalProgress())
    if as_json:
        print_json(asdict(done))
        return
    typer.echo(f"{'would delete' if dry_run else 'deleted'}: {', '.join(done.documents)}")
    for split, sequences in done.sequences.items():
        typer.echo(
            f"{split}: {sequences:,} sequences, {done.tokens[split]:,} tokens, "
            f"{done.blocks[split]:,} blocks rewritten"
        )
