"""``embedcache verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .show import TerminalProgress, print_json


def verify_command(
    cache: Annotated[Path, typer.Argument(help="A cache, finished or not.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte: hashes of all shards, all chunks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name every damaged file of a cache; exit 1 if there is one."""
    from embedcache.cache.verify import verify
    from embedcache.units import size

    found = verify(cache, deep=deep, progress=TerminalProgress())
    if as_json:
        print_json(asdict(found) | {"sound": not found.faults})
    else:
        for fault in found.faults:
            typer.echo(str(fault))
        checked = f"{found.files:,} files, {size(found.bytes)}"
        blocks = f"{found.committed} of {found.blocks} blocks committed"
        if found.faults:
            count = len(found.faults)
            typer.echo(
                f"{cache}: {count} {'fault' if count == 1 else 'faults'} in {checked} ({blocks}). "
                "Run the same 'embedcache extract' with --repair."
            )
        else:
            typer.echo(f"{cache}: no fault in {checked} ({blocks})")
        if not found.complete:
            typer.echo("It is not complete: run the same 'embedcache extract' again to go on.")
        elif not deep:
            typer.echo("Embeddings were not read: --deep reads every byte.")
    if found.faults:
        raise typer.Exit(1)
