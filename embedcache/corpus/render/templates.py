"""Prompt and completion templates: text with ``{field}`` in it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from embedcache.errors import CorpusError, UsageError, nearest


def template_fields(template: str, what: str) -> list[str]:
    """Return the fields of a template, in order; raise ``UsageError`` if it is malformed.

    >>> template_fields("Q: {question} of {{10}}", "prompt")
    ['question']
    """
    return [field for _, field in _parse(template, what) if field is not None]


def fill_template(template: str, record: Mapping[str, Any], what: str, where: str) -> str:
    """Return the template with each ``{field}`` replaced by the record's value.

    Raises:
        CorpusError: the record lacks a field, or the field is neither text nor a number.

    >>> fill_template("Q: {q}", {"q": 7}, "prompt", "a.jsonl:1")
    'Q: 7'
    """
    parts: list[str] = []
    for literal, field in _parse(template, what):
        parts.append(literal)
        if field is not None:
            parts.append(_value(record, field, what, where))
    return "".join(parts)


def _parse(template: str, what: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"Expected a {what} template such as '{{question}}', found {template!r} ({error}). "
            "Write {{ and }} for literal braces."
        ) from error
    for _, field, specification, conversion in parsed:
        if field is not None and (not field.strip() or specification or conversion):
            raise UsageError(
                f"Expected plain fields such as {{question}} in the {what} template, "
                f"found {template!r}. Write {{{{ and }}}} for literal braces."
            )
    return [(literal, field) for literal, field, _, _ in parsed]


def _value(record: Mapping[str, Any], field: str, what: str, where: str) -> str:
    if field not in record:
        raise CorpusError(
            f"{where}: the {what} template has the field '{field}', the record has "
            f"{', '.join(map(str, record))}.{nearest(field, map(str, record))}"
        )
    value = record[field]
    if not isinstance(value, (str, int, float)):
        raise CorpusError(
            f"{where}: expected text or a number in the field '{field}' of the {what} template, "
            f"found {type(value).__name__}."
        )
    return str(value)
