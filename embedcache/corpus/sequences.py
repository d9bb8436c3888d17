"""A document's tokens, cut into sequences of at most the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.corpus.render.tokenise import TokenisedDocument


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document, with the beginning-of-sequence token if there is one."""

    ids: npt.NDArray[np.uint32]
    """[T]"""
    loss_mask: npt.NDArray[np.bool_]
    """[T]; false for the first token, that nothing predicts."""
    span: npt.NDArray[np.uint32]
    """[T, 2]"""


def cut(
    document: TokenisedDocument, context: int, bos: int | None = None, limit: int | None = None
) -> Iterator[Window]:
    """Yield consecutive windows of at most ``context`` tokens that hold the first ``limit`` tokens.

    Where there is a ``bos`` every window starts with it, unless the document's text wrote it.
    """
    total = len(document.ids) if limit is None else min(limit, len(document.ids))
    start = 0
    while start < total:
        lead = bos is not None and not (start == 0 and document.ids[0] == bos)
        end = min(start + context - lead, total)
        ids = document.ids[start:end]
        mask = document.target[start:end].copy()
        span = document.span[start:end]
        if lead:
            ids = np.concatenate([np.asarray([bos], np.uint32), ids])
            mask = np.concatenate([np.zeros(1, np.bool_), mask])
            span = np.concatenate([np.full((1, 2), span[0, 0], np.uint32), span])
        mask[0] = False
        yield Window(ids, mask, span)
        start = end
