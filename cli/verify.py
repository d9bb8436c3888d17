"""``embedcache verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .errors import translated
from .show import TerminalProgress, counted, print_json

if TYPE_CHECKING:
    from embedcache.cache.verify import Verification

EXAMPLES = """
embedcache verify cache
embedcache verify cache --deep
"""


def verify_command(
    cache: Annotated[Path, typer.Argument(help="A cache, finished or not.", metavar="CACHE")],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Read every byte: check the hash of each shard and every chunk."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List every damaged file of a cache; exit with 1 if there is one.

    Without --deep, embeddings are checked by the size of their files only.
    """
    from embedcache.cache.verify import verify
    from embedcache.units import format_bytes

    found = verify(cache, deep=deep, progress=TerminalProgress())
    if as_json:
        print_json(asdict(found) | {"sound": not found.faults})
    else:
        for fault in found.faults:
            typer.echo(translated(str(fault)))
        checked = (
            f"{counted(found.files, 'files')}, {format_bytes(found.bytes)}; {found.committed:,} of "
            f"{counted(found.blocks, 'blocks')} committed"
        )
        faults = counted(len(found.faults), "faults") if found.faults else "no fault"
        typer.echo(f"{cache}: {faults} in {checked}")
        if found.faults:
            typer.echo(_advice(found))
        if found.writers:
            typer.echo(f"The cache is being written by {', '.join(found.writers)}.")
        elif not found.complete:
            typer.echo(
                "The cache is not complete: run the same 'embedcache extract' again to resume."
            )
        elif not deep:
            typer.echo("Embeddings were not read. To read every byte, add --deep.")
    if found.faults:
        raise typer.Exit(1)


def _advice(found: Verification) -> str:
    """Return how to repair the faults; the tokens of a merged cache cannot be made again."""
    if not found.parts:
        return "To repair it, run the same 'embedcache extract' with --repair."
    if not {fault.kind for fault in found.faults} & {"tokens", "codec"}:
        return (
            "To repair this merged cache, run 'embedcache extract --repair --out "
            f"{found.cache}' with its --base."
        )
    extracts = "; ".join(f"'embedcache extract {' '.join(part)} …'" for part in found.parts)
    return (
        f"Tokens or calibrations of this merged cache are damaged, so it must be merged again. Its "
        f"{len(found.parts)} caches were made by: {extracts}. Run 'embedcache verify --deep' on "
        "each, the same 'embedcache extract' with --repair on damaged ones, then 'embedcache "
        "merge' with a new --out."
    )
