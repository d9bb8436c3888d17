"""Render chats as text with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedcache.corpus.documents import Segment
from embedcache.errors import CorpusError

Message = Mapping[str, Any]


def check_messages(value: object, field: str, where: str) -> list[Message]:
    """Return ``value`` as messages; raise ``CorpusError`` if it is not a list of messages."""
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
    """Return the text of a chat as segments, with the assistant's messages as targets.

    A target starts where generation would start, and ends after the tokens that close the message.
    Messages after the last target are left out.

    Args:
        messages: the chat.
        tokenizer: a tokenizer with a chat template.
        where: the record, for errors.
        first_target: index of the first message that may be a target.

    Raises:
        CorpusError: there is no chat template, the template refuses the chat, or it renders a
            message differently when further messages follow.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CorpusError(
            f"{where}: a chat needs a tokenizer with a chat template, and this one has none. Use "
            "an instruction-tuned base, or set `prompt=` and `completion=` to templates of fields."
        )
    segments: list[Segment] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_target:
            continue
        prefix = _render(messages[:index], tokenizer, where, prompted=True)
        full = _render(messages[: index + 1], tokenizer, where, prompted=False)
        if not (prefix.startswith(rendered) and full.startswith(prefix)):
            raise CorpusError(
                f"{where}: expected a chat template that only appends, found one that renders "
                f"message {index + 1} or earlier ones differently when further messages follow. "
                "Split this chat into records of one answer each."
            )
        segments.append(Segment(prefix[len(rendered) :], target=False))
        segments.append(Segment(full[len(prefix) :], target=True))
        rendered = full
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
            f"({error}). Its roles are {', '.join(message['role'] for message in messages)}."
        ) from error
    return text
