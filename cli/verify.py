"""``embedcache verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .show import TerminalProgress, print_json

if TYPE_CHECKING:
    from embedcache.cache.verify import Verification


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
                f"{_way_out(found)}"
            )
        else:
            typer.echo(f"{cache}: no fault in {checked} ({blocks})")
        if found.writers:
            typer.echo(f"It is being written by {', '.join(found.writers)}.")
        elif not found.complete:
            typer.echo("It is not complete: run the same 'embedcache extract' again to go on.")
        elif not deep:
            typer.echo("Embeddings were not read: --deep reads every byte.")
    if found.faults:
        raise typer.Exit(1)


def _way_out(found: Verification) -> str:
    """Return what to type about faults: a merged cache cannot make its tokens anew."""
    if not found.parts:
        return "Run the same 'embedcache extract' with --repair."
    if not {fault.kind for fault in found.faults} & {"tokens", "codec"}:
        return (
            "It was merged and can be repaired as it is: run 'embedcache extract --repair --out "
            f"{found.cache}', with the --base that it has."
        )
    extracts = "; ".join(f"'embedcache extract {' '.join(part)} …'" for part in found.parts)
    return (
        f"It was merged from {len(found.parts)} caches, those of {extracts}: run 'embedcache "
        "verify --deep' on each, the same 'embedcache extract' with --repair on those that are "
        "damaged, and then 'embedcache merge' of all into a new --out."
    )
