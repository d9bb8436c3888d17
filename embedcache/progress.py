"""How long work tells its caller where it is. The library itself prints nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """One stage of work under way."""

    def advance(self, amount: int, facts: str = "") -> None:
        """Report ``amount`` more units done, and a few words on how it goes."""
        ...


class Progress(Protocol):
    """Makes bars and passes on remarks."""

    def bar(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
        """Begin a stage of ``total`` units (None where it is not known)."""
        ...

    def say(self, remark: str) -> None:
        """Pass on one line worth a user's attention."""
        ...


class Silent:
    """Progress that nobody watches."""

    def bar(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
        """Return a bar that does nothing."""
        return nullcontext(self)

    def advance(self, amount: int, facts: str = "") -> None:
        """Do nothing."""

    def say(self, remark: str) -> None:
        """Do nothing."""


SILENT = Silent()
