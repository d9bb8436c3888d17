"""Helpers of tests that append."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from support.fixtures_extract import corpus_config

from embedcache.cache.format.layout import ExtractSettings
from embedcache.editing.append import AppendSummary, append
from embedcache.extraction.extract import extract

ALONE: dict[str, Any] = {"context": 64, "block_tokens": 256, "batch_tokens": 1}
"""One sequence a batch: its embeddings are the same bits in any block."""


def extracted(out: Path, base: Path, *sources: Path, codec: str = "bf16", **corpus: Any) -> Path:
    """Extract sources into one cache with two taps."""
    config = replace(corpus_config(sources[0]), sources=tuple(map(str, sources)), **corpus)
    settings = ExtractSettings(**ALONE, codec=codec, taps=("final", "layer_1"))
    extract(config, base=str(base), out=out, settings=settings, device="cpu")
    return out


def added(cache: Path | str, *sources: Path | str, **given: Any) -> AppendSummary:
    """Append sources on the CPU."""
    return append(cache, sources, device="cpu", **given)


def every_byte(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache."""
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
