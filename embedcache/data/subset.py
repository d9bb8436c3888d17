"""Some of a split's documents, chosen by name, and where they lie.

Axes: E pairs of a block and a document in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

import numpy as np

from embedcache.cache.split_reader import SplitReader
from embedcache.errors import UsageError, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Subset:
    """Documents by number, the blocks that hold any of them, both ascending, and their tokens."""

    documents: Array
    blocks: Array
    tokens: int


class Documents:
    """Which documents lie in which blocks of a split, from its tables alone."""

    def __init__(self, split: SplitReader):
        self._split = split
        block_E, document_E, tokens_E = [], [], []
        for block in range(split.manifest.blocks):
            _, rows_S2, document_S = split.sequences(block)
            found, inverse = np.unique(document_S, return_inverse=True)
            tokens = np.bincount(inverse, rows_S2[:, 1] - rows_S2[:, 0], minlength=len(found))
            block_E.append(np.full(len(found), block))
            document_E.append(found)
            tokens_E.append(tokens)
        self._block_E, self._document_E = np.concatenate(block_E), np.concatenate(document_E)
        self._tokens_E = np.concatenate(tokens_E).astype(np.int64)

    def matching(self, patterns: Sequence[str]) -> Subset:
        """Return the documents whose name matches any pattern, as a shell matches names.

        They may be none; a split need not hold every subset.
        """
        match = re.compile("|".join(translate(pattern) for pattern in patterns)).match
        names = self._split.documents
        chosen = np.array([i for i, name in enumerate(names) if match(name)], np.int64)
        here_E = np.isin(self._document_E, chosen)
        return Subset(chosen, np.unique(self._block_E[here_E]), int(self._tokens_E[here_E].sum()))

    def require(self, patterns: Sequence[str]) -> Subset:
        """Return the documents that match; raise ``UsageError`` where no token is theirs."""
        found = self.matching(patterns)
        if not found.tokens:
            names = self._split.documents
            raise UsageError(
                f"no document of the {self._split.name} split matches {', '.join(patterns)}."
                f"{nearest(patterns[0], names)} It holds {len(names):,}, such as '{names[0]}'. "
                "Patterns are a shell's: 'alice/*'."
            )
        return found
