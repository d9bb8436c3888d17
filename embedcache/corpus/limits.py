"""How much of a corpus is taken: the limits, and what the pieces of a large file share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document
from embedcache.corpus.sequences import Window
from embedcache.corpus.summary import Split


class Budget:
    """What is left of ``limit_documents`` and ``limit_tokens``."""

    def __init__(self, config: CorpusConfig) -> None:
        self.documents = config.limit_documents
        self.tokens = config.limit_tokens

    @property
    def spent(self) -> bool:
        """Tell whether a limit is reached."""
        return (self.documents is not None and self.documents <= 0) or (
            self.tokens is not None and self.tokens <= 0
        )

    def take(self, windows: Iterable[Window]) -> list[Window]:
        """Return the windows up to the one that reaches the limit of tokens."""
        kept: list[Window] = []
        for window in windows:
            kept.append(window)
            if self.tokens is not None:
                self.tokens -= len(window.ids)
                if self.tokens <= 0:
                    break
        if kept and self.documents is not None:
            self.documents -= 1
        return kept


@dataclass(slots=True)
class Pieces:
    """The split of a large file's earlier pieces, and how many tokens they had."""

    split: Split | None = None
    tokens: int = 0

    def limit(self, document: Document, limit: int | None, length: int) -> int | None:
        """Return how many tokens of a document may be kept, its earlier pieces counted in."""
        if document.part < 2:
            self.split, self.tokens = None, 0
        left = None if limit is None else max(0, limit - self.tokens)
        self.tokens += length
        return left
