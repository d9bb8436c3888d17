"""A killed process, simulated in this one: nothing runs after the step at which it is killed."""

from __future__ import annotations

from typing import Any


class KilledError(BaseException):
    """Stands for the kill of the process."""


def killed(*_: object, **__: object) -> None:
    """Raise `KilledError`; replaces a function at whose call the process is killed."""
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
