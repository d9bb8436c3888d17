"""Processes that are gone, played in this one: nothing after the step at which one died runs."""

from __future__ import annotations

from typing import Any


class KilledError(BaseException):
    """Stands for a process that is gone."""


def killed(*_: object, **__: object) -> None:
    """Stand for a function at whose call a process is killed."""
    raise KilledError


def stopping(function: Any, call: int) -> Any:
    """Return ``function``, killed before its ``call``-th call."""
    calls = 0

    def stopped(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return function(*arguments, **more)

    return stopped
