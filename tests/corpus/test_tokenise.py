"""Token ids, targets and byte spans of documents."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_tokenizer

from embedcache.corpus.documents import Document, Kind, Segment
from embedcache.corpus.render.tokenise import Tokeniser
from embedcache.errors import CorpusError

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé日本😀👩\u200d🚀 \n"))


def made(*parts: tuple[str, bool], kind: Kind = "text", closed: bool = True) -> Document:
    return Document("a", tuple(Segment(*part) for part in parts), closed=closed, kind=kind)


@settings(max_examples=100, deadline=None)
@given(first=TEXT, second=TEXT)
def test_spans_are_the_characters_of_each_token(tokenizer: Any, first: str, second: str) -> None:
    tokens = Tokeniser(tokenizer).tokens(
        made((first, False), (second, True), kind="pair", closed=False)
    )
    assert tokens.data == (first + second).encode()
    assert tokens.span.dtype == tokens.ids.dtype == np.uint32
    # The reference is the tokenizer's own offsets.
    expected = [
        part[start:end]
        for part in (first, second)
        for start, end in tokenizer(
            part, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
    ]
    assert [tokens.data[start:end].decode() for start, end in tokens.span] == expected
    covered = np.zeros(len(tokens.data), bool)
    for start, end in tokens.span:
        covered[start:end] = True
    assert covered.all()
    assert (np.diff(tokens.span[:, 0].astype(np.int64)) >= 0).all()


@settings(max_examples=50, deadline=None)
@given(first=TEXT, second=TEXT)
def test_segments_are_tokenised_on_their_own(tokenizer: Any, first: str, second: str) -> None:
    tokens = Tokeniser(tokenizer).tokens(made((first, False), (second, True), kind="pair"))
    prompt = tokenizer(first, add_special_tokens=False).input_ids
    completion = tokenizer(second, add_special_tokens=False).input_ids
    assert tokens.ids.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert tokens.target.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert tokens.span[-1].tolist() == [len(tokens.data)] * 2


def test_a_batch_equals_its_documents(tokenizer: Any) -> None:
    documents = [made(("one 😀", True)), made(("", True)), made(("p", False), ("c", True))]
    tokeniser = Tokeniser(tokenizer)
    for one, other in zip(
        tokeniser.batch_tokens(documents), map(tokeniser.tokens, documents), strict=True
    ):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.span.tolist() == other.span.tolist()
    assert tokeniser.batch_tokens([]) == []


def test_the_end_of_sequence_token_is_not_repeated(tokenizer: Any) -> None:
    tokeniser = Tokeniser(tokenizer)
    end = tokenizer.eos_token_id
    assert tokeniser.tokens(made(("hi<|endoftext|>", True))).ids.tolist().count(end) == 1
    assert end not in tokeniser.tokens(made(("hi", True), closed=False)).ids


class _Stub:
    """A tokenizer with changed attributes."""

    def __init__(self, tokenizer: Any, **changes: Any) -> None:
        self._tokenizer = tokenizer
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._tokenizer(*arguments, **settings)


def test_no_end_of_sequence_token(tokenizer: Any) -> None:
    tokeniser = Tokeniser(_Stub(tokenizer, eos_token_id=None))
    expected = tokenizer("hi", add_special_tokens=False).input_ids
    assert tokeniser.tokens(made(("hi", True))).ids.tolist() == expected
    with pytest.raises(CorpusError, match="eos_token"):
        tokeniser.tokens(made(("p", False), ("c", True), kind="pair"))


def test_a_slow_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"tokenizer\.json"):
        Tokeniser(_Stub(tokenizer, is_fast=False))


def test_half_a_surrogate_pair(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"a: .*U\+D83D.*character 2"):
        Tokeniser(tokenizer).tokens(made(("ab\ud83d", True)))


def test_long_documents_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()  # a new one, because it warns only once
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        Tokeniser(tokenizer).tokens(made(("many words and more of them", True)))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_beginning_of_sequence(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert Tokeniser(tokenizer).bos is None
    assert Tokeniser(bos_tokenizer).bos == bos_tokenizer.bos_token_id
