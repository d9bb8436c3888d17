"""Documents to tokens: ids, which are targets, and the bytes each one spells.

Segments are tokenised one by one and joined, so that a prompt becomes the same tokens here as
alone at inference. Special tokens written in a text are read as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document
from embedcache.corpus.encoding import encode
from embedcache.errors import CorpusError


@dataclass(frozen=True, slots=True)
class TokenisedDocument:
    """The tokens of one document, uncut."""

    ids: npt.NDArray[np.uint32]
    """[T]"""
    target: npt.NDArray[np.bool_]
    """[T]"""
    span: npt.NDArray[np.uint32]
    """[T, 2]: first byte and end of each token in the document's UTF-8 text; empty for a token
    that was added. Tokens that share a character all have the bytes of that character."""
    data: bytes
    """The document's text."""


class Renderer:
    """Tokenises documents with a fast tokenizer. Raises ``CorpusError`` for a slow one."""

    def __init__(self, tokenizer: Any, config: CorpusConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise CorpusError(
                "Expected a fast tokenizer, that says where each token stands in the text, found "
                f"{type(tokenizer).__name__}: save the base with its tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.config = config
        self.eos: int | None = tokenizer.eos_token_id
        self.bos: int | None = _prepended_bos(tokenizer)
        """The id that starts every sequence, or none."""

    def tokens(self, document: Document) -> TokenisedDocument:
        """Return the tokens of one document, its end-of-sequence token included where closed."""
        return self.batch_tokens([document])[0]

    def batch_tokens(self, documents: Sequence[Document]) -> list[TokenisedDocument]:
        """Return the tokens of several documents, tokenised together for speed.

        Raises ``UndecodableError`` for text that is not Unicode, and ``CorpusError`` where a pair
        should end and the tokenizer has no end-of-sequence token.
        """
        bytes_of = [
            [encode(segment.text, document.label) for segment in document.segments]
            for document in documents
        ]
        texts = [segment.text for document in documents for segment in document.segments]
        if not texts:
            return []
        # verbose=False: a document is cut to the context after this, so its length is no mistake.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        return [
            self._join(document, data, [next(rows) for _ in data])
            for document, data in zip(documents, bytes_of, strict=True)
        ]

    def _join(
        self,
        document: Document,
        data: list[bytes],
        rows: list[tuple[list[int], list[tuple[int, int]]]],
    ) -> TokenisedDocument:
        ids, targets, spans = [], [], []
        start = 0
        for segment, encoded, (row, offsets) in zip(document.segments, data, rows, strict=True):
            ids.append(np.asarray(row, np.uint32))
            targets.append(np.full(len(row), segment.target))
            spans.append(byte_spans(encoded, offsets) + np.uint32(start))
            start += len(encoded)
        if document.closed and self._ends_open(document, ids):
            ids.append(np.asarray([self.eos], np.uint32))
            targets.append(np.ones(1, np.bool_))
            spans.append(np.full((1, 2), start, np.uint32))
        return TokenisedDocument(
            np.concatenate(ids), np.concatenate(targets), np.concatenate(spans), b"".join(data)
        )

    def _ends_open(self, document: Document, ids: list[npt.NDArray[np.uint32]]) -> bool:
        if self.eos is None:
            if document.kind == "pair":
                raise CorpusError(
                    f"{document.label}: a completion ends in an end-of-sequence token, this "
                    "tokenizer has none: name its eos_token in tokenizer_config.json."
                )
            return False
        last = next((row[-1] for row in reversed(ids) if len(row)), None)
        return last != self.eos


def byte_spans(data: bytes, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint32]:
    """Return the spans in ``data`` (UTF-8) of spans counted in characters, as uint32 [T, 2].

    >>> byte_spans("a😀b".encode(), [(0, 1), (1, 2), (2, 3)]).tolist()
    [[0, 1], [1, 5], [5, 6]]
    """
    span = np.asarray(offsets, np.uint32).reshape(-1, 2)
    if data.isascii():
        return span
    values = np.frombuffer(data, np.uint8)
    # A character starts at every byte that is not 0b10xxxxxx.
    starts = np.flatnonzero((values & 0xC0) != 0x80)
    return np.append(starts, len(data)).astype(np.uint32)[span]


def _prepended_bos(tokenizer: Any) -> int | None:
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
