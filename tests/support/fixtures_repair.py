"""Helpers for tests of repairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cache_faults import served
from support.fixtures_extract import content, corpus_config, small_settings, write_documents
from support.tiny import tiny_base_directory

from embedcache.base.forward import BlockForward
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.integers import ARRAYS, ArraySpec
from embedcache.cache.verify import verify
from embedcache.editing.repair import repair
from embedcache.extraction.extract import extract
from embedcache.store.files import STAGING

SHARD = "train/embeddings/final/c/2/0"
TOKENS = "train/tokens/ids/c/1"
HEAD = "base/head/weight/c/0/0"


def run(place: Path, out: Path, codec: str = "int8", **more: Any) -> Any:
    """Extract the corpus of ``place`` with small settings and two taps."""
    return extract(
        more.pop("corpus", None) or corpus_config(place / "corpus"),
        base=str(place / "base"),
        out=out,
        settings=small_settings(codec=codec, taps=("final", "layer_1")),
        device="cpu",
        **more,
    )


def repaired(place: Path, out: Path, codec: str = "int8", **more: Any) -> Any:
    """Repair what `run` extracted."""
    return repair(
        out,
        more.pop("corpus", None) or corpus_config(place / "corpus"),
        base=place / "base",
        settings=small_settings(codec=codec, taps=("final", "layer_1")),
        device="cpu",
        **more,
    )


def prepared(root: Path, codec: str) -> Path:
    """Make a base, a corpus, and the cache of an undisturbed run."""
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", 12, words=120)
    run(root, root / "undisturbed", codec)
    return root


def restored(place: Path, out: Path) -> None:
    """Assert that a cache equals the undisturbed one."""
    assert content(out) == content(place / "undisturbed")
    assert verify(out, deep=True).faults == ()
    assert Cache(out).manifest.hash == Cache(place / "undisturbed").manifest.hash
    assert served(out) == served(place / "undisturbed")
    blocks = sum(split.blocks for split in Cache(out).manifest.splits.values())
    assert sum(1 for _ in out.glob("commits/*/*")) == blocks
    assert not (out / STAGING).exists()


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for each block computed."""
    calls: list[int] = []
    forward = BlockForward.__call__

    def counted(self: BlockForward, *given: Any) -> Any:
        calls.append(1)
        return forward(self, *given)

    monkeypatch.setattr(BlockForward, "__call__", counted)
    return calls


def ones() -> dict[str, tuple[ArraySpec, np.ndarray[Any, Any]]]:
    """Return arrays of a train block that the base does not produce."""
    return {
        f"{spec.group}/{tap}": (spec, np.ones((256, 32) if spec.wide else (256,), spec.dtype))
        for tap in ("final", "layer_1")
        for spec in ARRAYS["int8"]
    }
