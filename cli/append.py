"""``embedcache extract --append``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from embedcache.units import duration, size

from .show import TerminalProgress, print_json, print_pairs


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
    pairs: list[tuple[str, object]] = [("cache", done.cache)]
    pairs += [
        (
            split,
            f"{done.tokens[split]:,} tokens, {done.sequences[split]:,} sequences, "
            f"{documents:,} documents {'would be ' if dry_run else ''}added",
        )
        for split, documents in done.documents.items()
    ]
    pairs.append(("passed over", f"{done.already_there:,} documents that it has already"))
    if done.elsewhere:
        pairs.append(
            (
                "warning",
                f"{done.elsewhere:,} documents are in another split than was asked, where they or "
                "near-duplicates of them were before",
            )
        )
    about = "about " if dry_run else ""
    pairs.append(("size", f"{about}{size(done.bytes)} more, in {about}{duration(done.seconds)}"))
    print_pairs(pairs)
    if any(done.documents.values()) and not dry_run:
        typer.echo("\nRuns of 'embedcache train' that were begun before need the cache as it was.")
