"""``embedcache extract --append``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from embedcache.units import format_bytes, format_seconds

from .show import TerminalProgress, print_json, print_pairs, split_pairs


def append_documents(
    corpus: Mapping[str, Any], *, out: Path, dry_run: bool, as_json: bool, **request: Any
) -> None:
    """Append a corpus to a finished cache; settings that were not typed are the cache's own."""
    from embedcache.editing.append import append, corpus_like

    config = corpus_like(out, **corpus)
    done = append(out, config, dry_run=dry_run, progress=TerminalProgress(), **request)
    if as_json:
        print_json(asdict(done))
        return
    added = " would be added" if dry_run else " added"
    about = "about " if dry_run else ""
    pairs: list[tuple[str, object]] = [
        ("cache", done.cache),
        *split_pairs(asdict(done), ("tokens", "sequences", "documents"), added),
        ("skipped", f"{done.already_there:,} documents that the cache already has"),
    ]
    if done.elsewhere:
        pairs.append(
            (
                "warning",
                f"{done.elsewhere:,} documents are in another split than requested, because they "
                "or near-duplicates of them were there before",
            )
        )
    pairs.append(
        (
            "size",
            f"{about}{format_bytes(done.bytes)} more, in {about}{format_seconds(done.seconds)}",
        )
    )
    print_pairs(pairs)
    if any(done.documents.values()) and not dry_run:
        typer.echo(
            "\nThe cache has changed: an unfinished run of 'embedcache train' on it cannot be "
            "resumed. Start it again with another --out."
        )
