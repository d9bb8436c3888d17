"""A document: the text of one file, record or chat, and which parts of it are targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "pair", "chat"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text, tokenised on its own; ``target`` where its tokens are to be learnt."""

    text: str
    target: bool


@dataclass(frozen=True, slots=True)
class Document:
    """What is cut into sequences and assigned to one split."""

    name: str
    """Path inside its source, or ``file:line`` of a record; unique within its source."""
    segments: tuple[Segment, ...]
    closed: bool = True
    """An end-of-sequence token follows. Chats end as their template has it."""
    kind: Kind = "text"
    part: int = 0
    """0 for a whole document; 1, 2, … for the consecutive pieces of a large file."""
    own_text: str | None = None
    """What near-duplicates are judged by where ``text`` holds a template shared by all."""

    @property
    def label(self) -> str:
        """The name, with ``#part`` for a piece of a large file."""
        return f"{self.name}#{self.part}" if self.part else self.name

    @property
    def text(self) -> str:
        """The rendered text, that byte spans point into."""
        return "".join(segment.text for segment in self.segments)
