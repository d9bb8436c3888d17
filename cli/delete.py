"""``embedcache delete``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .show import TerminalProgress, print_json, print_pairs, split_pairs

EXAMPLES = """
embedcache delete cache --document notes/a.txt --dry-run
embedcache delete cache --document notes/a.txt --document data.jsonl:12
"""


def delete_command(
    cache: Annotated[Path, typer.Argument(help="A finished cache.", metavar="CACHE")],
    documents: Annotated[
        list[str],
        typer.Option(
            "--document",
            metavar="NAME",
            help="Exact name of a document to delete; repeatable. 'embedcache inspect' shows the "
            "name of a sequence's document.",
        ),
    ],
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Delete documents from a cache for good.

    Their tokens, byte spans, embeddings and names are removed from the files. All documents with a
    given name are deleted, from every split, with all pieces of a large file that was cut. The
    manifest gets another hash, so an unfinished training run on the cache cannot be resumed.

    If a deletion is stopped, run the same command again; until then the cache cannot be read.

    Not deleted: what was computed from many documents together (the calibration of the transform
    codec, carry-ons that were trained before), copies of the cache, and the corpus itself.
    """
    from embedcache.editing.delete import delete

    done = delete(cache, documents, dry_run=dry_run, progress=TerminalProgress())
    if as_json:
        print_json(asdict(done))
        return
    rewritten = " to rewrite" if dry_run else " rewritten"
    print_pairs(
        [
            ("would delete" if dry_run else "deleted", ", ".join(done.documents)),
            *split_pairs(asdict(done), ("tokens", "sequences", "blocks"), rewritten),
        ]
    )
