"""A document's tokens cut into sequences of at most the context, within the corpus's limits.

Axes: T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document, Split
from embedcache.corpus.render.tokenise import TokenisedDocument


@dataclass(frozen=True, slots=True)
class Sequence:
    """Consecutive tokens of one document, after the beginning-of-sequence token if there is one."""

    ids: npt.NDArray[np.uint32]
    """Token ids [T]."""
    loss_mask: npt.NDArray[np.bool_]
    """Which tokens are targets [T]; false for the first, which nothing predicts."""
    span: npt.NDArray[np.uint32]
    """First byte and end of each token in the document's text [T, 2]."""


def cut(
    document: TokenisedDocument, context: int, bos: int | None = None, limit: int | None = None
) -> Iterator[Sequence]:
    """Yield the consecutive sequences of a document.

    Args:
        document: the tokens of the document.
        context: largest number of tokens of a sequence.
        bos: token id that starts every sequence. It is not repeated if the text begins with it.
        limit: number of the document's tokens to keep; None for all.
    """
    total = len(document.ids) if limit is None else min(limit, len(document.ids))
    start = 0
    while start < total:
        add_bos = bos is not None and not (start == 0 and document.ids[0] == bos)
        end = min(start + context - add_bos, total)
        ids = document.ids[start:end]
        mask = document.target[start:end].copy()
        span = document.span[start:end]
        if add_bos:
            ids = np.concatenate([np.asarray([bos], np.uint32), ids])
            mask = np.concatenate([np.zeros(1, np.bool_), mask])
            span = np.concatenate([np.full((1, 2), span[0, 0], np.uint32), span])
        mask[0] = False
        yield Sequence(ids, mask, span)
        start = end


class Budget:
    """The rest of ``limit_documents`` and ``limit_tokens``."""

    def __init__(self, config: CorpusConfig) -> None:
        self.documents = config.limit_documents
        self.tokens = config.limit_tokens

    @property
    def spent(self) -> bool:
        """Whether a limit is reached."""
        return (self.documents is not None and self.documents <= 0) or (
            self.tokens is not None and self.tokens <= 0
        )

    def take(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Return a document's sequences up to the one that reaches the limit of tokens."""
        taken: list[Sequence] = []
        for sequence in sequences:
            taken.append(sequence)
            if self.tokens is not None:
                self.tokens -= len(sequence.ids)
                if self.tokens <= 0:
                    break
        if taken and self.documents is not None:
            self.documents -= 1
        return taken


@dataclass(slots=True)
class FileParts:
    """What the parts of one large file share: their split and the limit of tokens."""

    split: Split | None = None
    tokens: int = 0

    def limit(self, document: Document, limit: int | None, length: int) -> int | None:
        """Return how many of a part's ``length`` tokens may be kept after the earlier parts."""
        if document.part < 2:
            self.split, self.tokens = None, 0
        left = None if limit is None else max(0, limit - self.tokens)
        self.tokens += length
        return left
