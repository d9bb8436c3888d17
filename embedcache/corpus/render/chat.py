"""Chats as text, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedcache.corpus.documents import Segment
from embedcache.errors import CorpusError

Message = Mapping[str, Any]


def check_messages(value: object, field: str, where: str) -> list[Message]:
    """Return ``value`` as messages. Raises ``CorpusError`` where it is not a list of them."""
    if not isinstance(value, list) or not value:
        raise CorpusError(
            f"{where}: expected a list of messages in the field '{field}', "
            f"found {'an empty list' if value == [] else type(value).__name__}."
        )
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            keys = ", ".join(map(str, message)) if isinstance(message, Mapping) else message
            raise CorpusError(
                f"{where}: expected each message of '{field}' to have 'role' and 'content' as "
                f"text, found in message {index + 1}: {keys!s:.100}."
            )
    return value


def chat_segments(
    messages: Sequence[Message], tokenizer: Any, where: str, first_target: int = 0
) -> tuple[Segment, ...]:
    """Return a chat's text in segments; each assistant message from ``first_target`` is a target.

    A target runs from where generation would start to the end of the message, its closing
    included; what follows the last target is left out. Raises ``CorpusError`` where there is no
    template, or where it writes a message otherwise once more messages follow.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CorpusError(
            f"{where}: a chat needs a tokenizer with a chat template, this one has none: use an "
            'instruction-tuned base, or type --prompt "{field}" --completion "{field}".'
        )
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_target:
            continue
        prefix = _render(messages[:index], tokenizer, where, prompted=True)
        full = _render(messages[: index + 1], tokenizer, where, prompted=False)
        if not (prefix.startswith(done) and full.startswith(prefix)):
            raise CorpusError(
                f"{where}: expected a chat template that only appends, found one that writes "
                f"message {index + 1} or those before it otherwise when more follows: "
                "split this chat into records of one answer each."
            )
        segments.append(Segment(prefix[len(done) :], target=False))
        segments.append(Segment(full[len(prefix) :], target=True))
        done = full
    if not segments:
        return (Segment(_render(messages, tokenizer, where, prompted=False), target=False),)
    return tuple(segments)


def _render(messages: Sequence[Message], tokenizer: Any, where: str, *, prompted: bool) -> str:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompted
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
        raise CorpusError(
            f"{where}: the chat template refused the first {len(messages)} messages of this chat "
            f"({error}): roles found are {', '.join(message['role'] for message in messages)}."
        ) from error
    return text
