"""``embedcache merge``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .show import TerminalProgress, print_json


def merge_command(
    caches: Annotated[list[Path], typer.Argument(help="Finished caches, two or more.")],
    out: Annotated[Path, typer.Option(help="The new cache.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make every check, say what it holds; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Join finished caches of one base into a new one; they are left as they are.

    They must be alike in codec (for transform: of the very same calibration), taps, context and
    block size. A document that two of them hold, with the same name and tokens, is an error, as is
    one that is in another split of another cache, whatever its name: delete it from one of them
    first. Near-duplicates are not looked for. A name that an earlier cache has for another text
    becomes name@2. Damaged embeddings are repaired by 'embedcache extract --repair --out' without a
    corpus; for damaged tokens, merge again.
    """
    from embedcache.editing.merge import merge
    from embedcache.units import size

    done = merge(caches, out, dry_run=dry_run, progress=TerminalProgress())
    if as_json:
        print_json(asdict(done))
        return
    typer.echo(f"{done.out}: {'would take' if dry_run else 'merged'}, {size(done.bytes)}")
    for split, documents in done.documents.items():
        typer.echo(
            f"{split}: {documents:,} documents, {done.sequences[split]:,} sequences, "
            f"{done.tokens[split]:,} tokens, {done.blocks[split]:,} blocks"
        )
    if done.renamed:
        typer.echo(f"{done.renamed:,} documents have names that were taken: they end in @2, @3, …")
