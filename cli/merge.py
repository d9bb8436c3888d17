"""``embedcache merge``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .show import TerminalProgress, print_json, print_pairs, split_pairs

EXAMPLES = """
embedcache merge first second --out both --dry-run
embedcache merge first second third --out all
"""


def merge_command(
    caches: Annotated[
        list[Path], typer.Argument(help="Two or more finished caches.", metavar="CACHE")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new cache.")],
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Join finished caches of one base into a new one.

    Blocks are copied; nothing is computed. The caches must have the same codec, taps, context and
    block size; with the transform codec also the same calibration.

    A document that two caches hold (the same name and tokens, or the same tokens in another split)
    is an error: delete it from one of them first. Near-duplicates are not detected. If two
    documents with different texts have one name, the later one becomes name@2.

    To repair damaged embeddings of a merged cache, run 'embedcache extract --repair --out CACHE'
    without a corpus. If its tokens are damaged, merge again.
    """
    from embedcache.editing.merge import merge
    from embedcache.units import format_bytes

    done = merge(caches, out, dry_run=dry_run, progress=TerminalProgress())
    if as_json:
        print_json(asdict(done))
        return
    pairs: list[tuple[str, object]] = [
        ("would write" if dry_run else "cache", done.out),
        *split_pairs(asdict(done), ("tokens", "sequences", "documents", "blocks")),
        ("size", format_bytes(done.bytes)),
    ]
    if done.renamed:
        names = "would become" if dry_run else "are now"
        pairs.append(
            ("renamed", f"{done.renamed:,} documents whose name was taken {names} name@2, @3, …")
        )
    print_pairs(pairs)
