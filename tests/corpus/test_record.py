"""The fields of a record that make its document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document
from embedcache.corpus.render.record import record_document
from embedcache.errors import CorpusError


def document(record: Mapping[str, Any], tokenizer: Any = None, **settings: Any) -> Document:
    config = CorpusConfig(sources=("a",), **settings)
    return record_document(record, "a.jsonl:7", "dir/a.jsonl:7", config, tokenizer)


def parts(document: Document) -> list[tuple[str, bool]]:
    return [(segment.text, segment.target) for segment in document.segments]


def test_text() -> None:
    made = document({"text": "hello", "id": 3})
    assert (made.kind, parts(made), made.closed) == ("text", [("hello", True)], True)
    assert parts(document({"body": "b", "text": "t"}, text_field="body")) == [("b", True)]


def test_prompt_and_completion() -> None:
    made = document({"text": "unused", "prompt": "2+2=", "completion": "4"})
    assert (made.kind, made.closed) == ("pair", True)
    assert parts(made) == [("2+2=", False), ("4", True)]


def test_templates() -> None:
    made = document(
        {"question": "2+2?", "answer": 4}, prompt="Q: {question} {{x}}\nA: ", completion="{answer}"
    )
    assert parts(made) == [("Q: 2+2? {x}\nA: ", False), ("4", True)]
    assert made.own_text == "2+2?\n4"


def test_messages_come_before_other_fields(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    made = document(
        {"messages": messages, "text": "t", "prompt": "p", "completion": "c"}, tokenizer
    )
    assert made.kind == "chat"
    assert not made.closed
    assert document({"talk": messages}, tokenizer, messages_field="talk").segments == made.segments


def test_lists_of_messages_as_prompt_and_completion(tokenizer: Any) -> None:
    prompt = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    made = document(
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}]}, tokenizer
    )
    assert [text for text, target in parts(made) if target] == ["4<|im_end|>\n"]
    assert made.text == tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": "4"}], tokenize=False
    )


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            {},
            r'dir/a\.jsonl:7: .*found question, answer.*`prompt=` to "\{question\}" and '
            r'`completion=` to "\{answer\}"',
        ),
        ({"txt": "t"}, {}, "Did you mean 'txt'.*`text_field=` to txt"),
        ({}, {}, "found none"),
        ({"text": None}, {}, "found text"),
        ({"body": "t"}, {"text_field": "bdy"}, "the field 'bdy', found body. Did you mean 'body'"),
        ({"body": 3}, {"text_field": "body"}, "expected text in the field 'body', found int"),
        ({"a": "t"}, {"messages_field": "b"}, "`messages_field=`"),
        (
            {"question": "q"},
            {"prompt": "{qestion}", "completion": "{question}"},
            "'qestion'.*Did you mean 'question'",
        ),
        ({"q": "q", "a": [1]}, {"prompt": "{q}", "completion": "{a}"}, "number.*found list"),
        ({"q": "q", "a": None}, {"prompt": "{q}", "completion": "{a}"}, "found NoneType"),
        ({"prompt": "p", "completion": []}, {}, "both as text"),
        ({"messages": "hi"}, {}, "list of messages"),
        ({"messages": []}, {}, "an empty list"),
        ({"messages": [{"from": "me", "value": "x"}]}, {}, "message 1: from, value"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "needs a tokenizer"),
    ],
)
def test_errors_name_the_record_and_the_remedy(
    record: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message) as raised:
        document(record, **settings)
    assert str(raised.value).startswith("dir/a.jsonl:7: ")
