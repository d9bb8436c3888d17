"""Tokens, targets and the bytes they spell."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_tokenizer

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document, Kind, Segment
from embedcache.corpus.render.tokenise import Renderer
from embedcache.errors import CorpusError

CONFIG = CorpusConfig(sources=("a",))
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé日本😀👩\u200d🚀 \n"))


def made(*parts: tuple[str, bool], kind: Kind = "text", closed: bool = True) -> Document:
    return Document("a", tuple(Segment(*part) for part in parts), closed=closed, kind=kind)


@settings(max_examples=100, deadline=None)
@given(first=TEXT, second=TEXT)
def test_spans_are_the_characters_of_each_token(tokenizer: Any, first: str, second: str) -> None:
    tokens = Renderer(tokenizer, CONFIG).tokens(
        made((first, False), (second, True), kind="pair", closed=False)
    )
    assert tokens.data == (first + second).encode()
    assert tokens.span.dtype == tokens.ids.dtype == np.uint32
    # The tokenizer's own characters of each token are the oracle.
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
    tokens = Renderer(tokenizer, CONFIG).tokens(made((first, False), (second, True), kind="pair"))
    prompt = tokenizer(first, add_special_tokens=False).input_ids
    completion = tokenizer(second, add_special_tokens=False).input_ids
    assert tokens.ids.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert tokens.target.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert tokens.span[-1].tolist() == [len(tokens.data)] * 2


def test_a_batch_is_what_its_documents_are(tokenizer: Any) -> None:
    documents = [made(("one 😀", True)), made(("", True)), made(("p", False), ("c", True))]
    renderer = Renderer(tokenizer, CONFIG)
    for one, other in zip(
        renderer.batch_tokens(documents), map(renderer.tokens, documents), strict=True
    ):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.span.tolist() == other.span.tolist()
    assert renderer.batch_tokens([]) == []


def test_the_end_is_not_written_twice(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, CONFIG)
    end = tokenizer.eos_token_id
    assert renderer.tokens(made(("hi<|endoftext|>", True))).ids.tolist().count(end) == 1
    assert end not in renderer.tokens(made(("hi", True), closed=False)).ids


class _Stub:
    """A tokenizer's surface with one thing changed."""

    def __init__(self, tokenizer: Any, **changes: Any) -> None:
        self._tokenizer = tokenizer
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._tokenizer(*arguments, **settings)


def test_no_end_of_sequence_token(tokenizer: Any) -> None:
    renderer = Renderer(_Stub(tokenizer, eos_token_id=None), CONFIG)
    expected = tokenizer("hi", add_special_tokens=False).input_ids
    assert renderer.tokens(made(("hi", True))).ids.tolist() == expected
    with pytest.raises(CorpusError, match="eos_token"):
        renderer.tokens(made(("p", False), ("c", True), kind="pair"))


def test_a_slow_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"tokenizer\.json"):
        Renderer(_Stub(tokenizer, is_fast=False), CONFIG)


def test_half_a_surrogate_pair(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"a: .*U\+D83D.*character 2"):
        Renderer(tokenizer, CONFIG).tokens(made(("ab\ud83d", True)))


def test_long_documents_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()  # a fresh one: it warns once
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        Renderer(tokenizer, CONFIG).tokens(made(("many words and more of them", True)))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_beginning_of_sequence(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert Renderer(tokenizer, CONFIG).bos is None
    assert Renderer(bos_tokenizer, CONFIG).bos == bos_tokenizer.bos_token_id
