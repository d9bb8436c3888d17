"""Tokenise documents: token ids, which of them are targets, and the byte span of each.

Each segment is tokenised on its own, so that a prompt has the same tokens here as at inference.
Special tokens that are written in a text are read as special tokens.

Axes: T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.corpus.documents import Document
from embedcache.corpus.encoding import encode
from embedcache.errors import CorpusError


@dataclass(frozen=True, slots=True)
class TokenisedDocument:
    """The tokens of one document, before it is cut."""

    ids: npt.NDArray[np.uint32]
    """Token ids [T]."""
    target: npt.NDArray[np.bool_]
    """Which tokens are targets [T]."""
    span: npt.NDArray[np.uint32]
    """First byte and end of each token in the document's UTF-8 text [T, 2]. The span of an added
    token is empty. Tokens that share a character each have the span of that character."""
    data: bytes
    """The document's text in UTF-8."""


class Tokeniser:
    """Tokenises documents.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        CorpusError: the tokenizer is a slow one, which gives no offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise CorpusError(
                "Expected a fast tokenizer, which gives the offsets of tokens in the text, found "
                f"{type(tokenizer).__name__}. Save the base with its tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.bos: int | None = _prepended_bos(tokenizer)
        """Token id that starts every sequence, or None."""

    def tokens(self, document: Document) -> TokenisedDocument:
        """Return the tokens of one document, with its end-of-sequence token if it is closed."""
        return self.batch_tokens([document])[0]

    def batch_tokens(self, documents: Sequence[Document]) -> list[TokenisedDocument]:
        """Return the tokens of several documents, tokenised together for speed.

        Raises:
            UndecodableError: a text is not Unicode.
            CorpusError: a pair needs an end-of-sequence token and the tokenizer has none.
        """
        bytes_of = [
            [encode(segment.text, document.label) for segment in document.segments]
            for document in documents
        ]
        texts = [segment.text for document in documents for segment in document.segments]
        if not texts:
            return []
        # verbose=False: no warning about long texts; documents are cut to the context later.
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
        if document.closed and self._needs_eos(document, ids):
            ids.append(np.asarray([self.eos], np.uint32))
            targets.append(np.ones(1, np.bool_))
            spans.append(np.full((1, 2), start, np.uint32))
        return TokenisedDocument(
            np.concatenate(ids), np.concatenate(targets), np.concatenate(spans), b"".join(data)
        )

    def _needs_eos(self, document: Document, ids: list[npt.NDArray[np.uint32]]) -> bool:
        if self.eos is None:
            if document.kind == "pair":
                raise CorpusError(
                    f"{document.label}: a completion ends with an end-of-sequence token, and this "
                    "tokenizer has none. Set eos_token in its tokenizer_config.json."
                )
            return False
        last = next((row[-1] for row in reversed(ids) if len(row)), None)
        return last != self.eos


def byte_spans(data: bytes, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint32]:
    """Return the byte spans in UTF-8 ``data`` of spans in characters, as uint32 [T, 2].

    >>> byte_spans("a😀b".encode(), [(0, 1), (1, 2), (2, 3)]).tolist()
    [[0, 1], [1, 5], [5, 6]]
    """
    span = np.asarray(offsets, np.uint32).reshape(-1, 2)
    if data.isascii():
        return span
    values = np.frombuffer(data, np.uint8)
    # Every byte but 0b10xxxxxx starts a character.
    starts = np.flatnonzero((values & 0xC0) != 0x80)
    return np.append(starts, len(data)).astype(np.uint32)[span]


def _prepended_bos(tokenizer: Any) -> int | None:
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
