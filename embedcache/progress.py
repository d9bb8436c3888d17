"""Progress reports of long work to its caller. The library itself prints nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """The progress of one stage of work."""

    def advance(self, amount: int, facts: str = "") -> None:
        """Report that ``amount`` more units are done, with a short text such as a speed."""
        ...


class Progress(Protocol):
    """Receives progress and remarks."""

    def bar(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
        """Start a stage of ``total`` units (None if unknown)."""
        ...

    def say(self, remark: str) -> None:
        """Show one line to the user."""
        ...


class Silent:
    """Progress that is ignored."""

    def bar(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Bar]:
        """Return a bar that does nothing."""
        return nullcontext(self)

    def advance(self, amount: int, facts: str = "") -> None:
        """Do nothing."""

    def say(self, remark: str) -> None:
        """Do nothing."""


SILENT = Silent()
