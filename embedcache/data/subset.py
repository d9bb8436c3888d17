"""Selects documents of a split by name, and finds the blocks that hold them."""

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
    """Some documents of a split.

    Attributes:
        documents: numbers of the documents, ascending.
        blocks: numbers of the blocks that hold any of them, ascending.
        tokens: number of their tokens.
    """

    documents: Array
    blocks: Array
    tokens: int


class Documents:
    """An index of the documents in each block of a split, from the split's tables alone."""

    def __init__(self, split: SplitReader):
        self._split = split
        # One entry for each pair of a block and a document in it.
        block, document, tokens = [], [], []
        for number in range(split.manifest.blocks):
            _, rows_S2, document_S = split.sequences(number)
            found, inverse = np.unique(document_S, return_inverse=True)
            lengths_S = rows_S2[:, 1] - rows_S2[:, 0]
            block.append(np.full(len(found), number))
            document.append(found)
            tokens.append(np.bincount(inverse, lengths_S, minlength=len(found)))
        self._block, self._document = np.concatenate(block), np.concatenate(document)
        self._tokens = np.concatenate(tokens).astype(np.int64)

    def matching(self, patterns: Sequence[str]) -> Subset:
        """Return the documents whose name matches any shell pattern; there may be none."""
        match = re.compile("|".join(translate(pattern) for pattern in patterns)).match
        names = self._split.documents
        documents = np.array([i for i, name in enumerate(names) if match(name)], np.int64)
        selected = np.isin(self._document, documents)
        return Subset(
            documents, np.unique(self._block[selected]), int(self._tokens[selected].sum())
        )

    def require(self, patterns: Sequence[str]) -> Subset:
        """Return the documents whose name matches any shell pattern.

        Raises:
            UsageError: if the matching documents hold no token of this split.
        """
        subset = self.matching(patterns)
        if not subset.tokens:
            names = self._split.documents
            raise UsageError(
                f"expected a pattern that matches documents of the {self._split.name} split, found "
                f"{', '.join(patterns)}.{nearest(patterns[0], names)} The split holds "
                f"{len(names):,} documents, such as '{names[0]}'. Patterns are those of a shell, "
                "for example 'alice/*'."
            )
        return subset
