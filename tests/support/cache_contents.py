"""The readable content of a cache, by document."""

from __future__ import annotations

import itertools
from pathlib import Path

from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.tokens.reader import SplitTokens

Content = dict[tuple[str, str, int], dict[str, bytes]]


def contents(path: Path) -> Content:
    """Return every readable sequence, by split, document and number within the document."""
    cache = Cache(path)
    found: Content = {}
    for name in SPLITS:
        if not cache.has(name):
            continue
        split = cache.split(name)
        tokens = SplitTokens(path, name, cache.attributes.settings.block_tokens)
        for number in range(split.manifest.blocks):
            block, span_R2 = split.block(number), tokens.spans(number)
            for document, (a, b) in zip(block.document_S, block.rows_S2.tolist(), strict=True):
                key = next(
                    key
                    for place in itertools.count()
                    if (key := (name, split.documents[document], place)) not in found
                )
                found[key] = {
                    "ids": block.ids_N[a:b].tobytes(),
                    "mask": block.loss_mask_N[a:b].tobytes(),
                    "span": span_R2[a:b].tobytes(),
                    **{tap: x[a:b].float().numpy().tobytes() for tap, x in block.x_NH.items()},
                }
    return found


def names(path: Path, split: str) -> list[str]:
    return Cache(path).split(split).documents
