"""Targets of chats, compared with the assistant masks of transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.corpus.documents import Document
from embedcache.corpus.render.chat import chat_segments
from embedcache.corpus.render.tokenise import Tokeniser
from embedcache.errors import CorpusError

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
# A letter comes first. The reference tokenises the whole text, where a space would join the line
# end before it; targets here are tokenised from where generation starts.
CONTENT = st.text("ab é日😀.\n", max_size=12).map("x{}".format)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


@settings(max_examples=50, deadline=None)
@given(turns=TURNS)
def test_targets_are_the_messages_that_the_template_marks_as_generated(
    tokenizer: Any, turns: list[tuple[str, str]]
) -> None:
    messages = chat(turns)
    segments = chat_segments(messages, tokenizer, "a:1")
    document = Document("a:1", segments, closed=False, kind="chat")
    tokens = Tokeniser(tokenizer).tokens(document)

    # Compare the characters that transformers marks as generated with the bytes of the targets.
    oracle = tokenizer.apply_chat_template(
        messages,
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    text = tokenizer.apply_chat_template(messages, chat_template=MARKED, tokenize=False)
    assert tokens.data == text.encode()
    generated = np.zeros(len(text), bool)
    for (start, end), mark in zip(oracle["offset_mapping"], oracle["assistant_masks"], strict=True):
        generated[start:end] |= bool(mark)
    expected = np.repeat(generated, [len(character.encode()) for character in text])
    found = np.zeros(len(tokens.data), bool)
    for (start, end), target in zip(tokens.span, tokens.target, strict=True):
        found[start:end] |= target
    assert (found == expected).all()


def test_special_tokens_of_the_template_are_single_tokens(tokenizer: Any) -> None:
    document = Document(
        "a:1", chat_segments(chat([("hi", "yo")]), tokenizer, "a:1"), closed=False, kind="chat"
    )
    ids = Tokeniser(tokenizer).tokens(document).ids.tolist()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2
    assert ids[-1] != tokenizer.eos_token_id


def test_a_chat_without_an_answer_has_no_target(tokenizer: Any) -> None:
    [segment] = chat_segments([{"role": "user", "content": "hi"}], tokenizer, "a:1")
    assert not segment.target


def test_messages_after_the_last_answer_are_left_out(tokenizer: Any) -> None:
    messages = chat([("hi", "yo")])
    longer = [*messages, {"role": "user", "content": "bye"}]
    assert chat_segments(longer, tokenizer, "a") == chat_segments(messages, tokenizer, "a")


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def test_no_template(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"a:1: .*chat template.*`prompt=`"):
        chat_segments(chat([("hi", "yo")]), with_template(tokenizer, None), "a:1")


def test_a_template_that_rewrites_earlier_messages(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if loop.last %}last {% endif %}"
        "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(CorpusError, match=r"a:1: .*only appends"):
        chat_segments(chat([("hi", "yo")]), with_template(tokenizer, template), "a:1")


def test_a_template_that_refuses_the_chat(tokenizer: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match=r"a:1: .*roles must alternate.*user"):
        chat_segments(chat([("hi", "yo")]), with_template(tokenizer, template), "a:1")
