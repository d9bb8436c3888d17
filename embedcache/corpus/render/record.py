"""Render a record, a row of fields, as a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import Document, Segment
from embedcache.corpus.render.chat import chat_segments, check_messages
from embedcache.corpus.render.templates import fill_template, template_fields
from embedcache.errors import CorpusError, nearest

KNOWN_FIELDS = ("messages", "prompt", "completion", "text")


def record_document(
    record: Mapping[str, Any], name: str, where: str, config: CorpusConfig, tokenizer: Any
) -> Document:
    """Return the document of a record.

    If ``config`` sets no fields, the record's own fields decide, in this order: ``messages`` is a
    chat, ``prompt`` and ``completion`` are a pair (two texts or two lists of messages), and
    ``text`` is plain text.

    Args:
        record: the fields and their values.
        name: name of the document.
        where: file and line, for errors.
        config: the settings that name fields or templates.
        tokenizer: the tokenizer whose chat template renders chats.

    Raises:
        CorpusError: the record lacks a field, or a field has the wrong type.
    """
    if config.text_field is not None:
        return _plain(_text(record, config.text_field, where, "text_field"), name)
    if config.messages_field is not None:
        value = _field(record, config.messages_field, where, "messages_field")
        return _chat(check_messages(value, config.messages_field, where), name, where, tokenizer)
    if config.prompt is not None and config.completion is not None:
        return _templated(record, name, where, config.prompt, config.completion)
    if record.get("messages") is not None:
        return _chat(check_messages(record["messages"], "messages", where), name, where, tokenizer)
    if record.get("prompt") is not None and record.get("completion") is not None:
        return _prompt_completion(record, name, where, tokenizer)
    if record.get("text") is not None:
        return _plain(_text(record, "text", where, "text_field"), name)
    raise CorpusError(_missing_fields(record, where))


def _plain(text: str, name: str) -> Document:
    return Document(name, (Segment(text, target=True),))


def _pair(prompt: str, completion: str, name: str, own_text: str | None = None) -> Document:
    segments = (Segment(prompt, target=False), Segment(completion, target=True))
    return Document(name, segments, kind="pair", own_text=own_text)


def _templated(
    record: Mapping[str, Any], name: str, where: str, prompt: str, completion: str
) -> Document:
    fields = template_fields(prompt, "prompt") + template_fields(completion, "completion")
    return _pair(
        fill_template(prompt, record, "prompt", where),
        fill_template(completion, record, "completion", where),
        name,
        own_text="\n".join(str(record[field]) for field in fields),
    )


def _prompt_completion(
    record: Mapping[str, Any], name: str, where: str, tokenizer: Any
) -> Document:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(prompt, completion, name)
    if isinstance(prompt, list) and isinstance(completion, list):
        question = check_messages(prompt, "prompt", where)
        answer = check_messages(completion, "completion", where)
        return _chat(question + answer, name, where, tokenizer, first_target=len(question))
    raise CorpusError(
        f"{where}: expected 'prompt' and 'completion' both as text or both as lists of messages, "
        f"found {type(prompt).__name__} and {type(completion).__name__}."
    )


def _chat(
    messages: list[Mapping[str, Any]], name: str, where: str, tokenizer: Any, first_target: int = 0
) -> Document:
    if tokenizer is None:
        raise CorpusError(f"{where}: a chat needs a tokenizer. Pass one.")
    own_text = "\n".join(m["content"] for m in messages if m["role"] != "system")
    segments = chat_segments(messages, tokenizer, where, first_target)
    return Document(name, segments, closed=False, kind="chat", own_text=own_text)


def _field(record: Mapping[str, Any], field: str, where: str, setting: str) -> Any:
    if field not in record:
        found = [str(key) for key in record]
        close = nearest(field, found)
        raise CorpusError(
            f"{where}: expected the field '{field}', found {', '.join(found) or 'none'}.{close} "
            f"Set `{setting}=` to one of those."
        )
    return record[field]


def _text(record: Mapping[str, Any], field: str, where: str, setting: str) -> str:
    value = _field(record, field, where, setting)
    if not isinstance(value, str):
        raise CorpusError(
            f"{where}: expected text in the field '{field}', found {type(value).__name__}."
        )
    return value


def _missing_fields(record: Mapping[str, Any], where: str) -> str:
    found = [str(key) for key in record]
    texts = [key for key in found if isinstance(record[key], str)]
    close = next((hint for known in KNOWN_FIELDS if (hint := nearest(known, found))), "")
    advice = "set `text_field=` to the field with the text."
    if len(texts) >= 2:
        advice = (
            f'set `prompt=` to "{{{texts[0]}}}" and `completion=` to "{{{texts[1]}}}", '
            f"or `text_field=` to {texts[0]}."
        )
    elif texts:
        advice = f"set `text_field=` to {texts[0]}."
    return (
        f"{where}: expected the field 'messages', 'text', or 'prompt' and 'completion', found "
        f"{', '.join(found) or 'none'}.{close} To choose fields, {advice}"
    )
