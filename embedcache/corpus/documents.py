"""Documents, their splits, and the counts of one pass over a corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["text", "pair", "chat"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a document that is tokenised on its own."""

    text: str
    target: bool
    """Whether its tokens are targets of the loss."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is cut into sequences and belongs to one split."""

    name: str
    """Path inside its source, or ``file:line`` of a record; unique within its source."""
    segments: tuple[Segment, ...]
    closed: bool = True
    """Whether an end-of-sequence token follows. A chat ends as its template says."""
    kind: Kind = "text"
    part: int = 0
    """0 for a whole document; 1, 2, … for the consecutive parts of a large file."""
    own_text: str | None = None
    """The text without its template, compared for near-duplicates; None if there is no template."""

    @property
    def label(self) -> str:
        """The name, with ``#part`` for a part of a large file."""
        return f"{self.name}#{self.part}" if self.part else self.name

    @property
    def text(self) -> str:
        """The rendered text, into which byte spans point."""
        return "".join(segment.text for segment in self.segments)


def _zeros() -> dict[Split, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass(slots=True)
class CorpusSummary:
    """Counts of one pass over a corpus; they are up to date during the pass."""

    documents: dict[Split, int] = field(default_factory=_zeros)
    """Documents with at least one sequence, by split."""
    sequences: dict[Split, int] = field(default_factory=_zeros)
    tokens: dict[Split, int] = field(default_factory=_zeros)
    """Tokens of the sequences, special tokens included, by split."""
    target_tokens: dict[Split, int] = field(default_factory=_zeros)
    """Tokens that are targets, by split."""
    files: int = 0
    """Files and data sets opened."""
    dropped_short: int = 0
    """Sequences of plain text below ``min_tokens``."""
    dropped_without_target: int = 0
    """Sequences of pairs and chats without a target."""
    skipped_undecodable: int = 0
    """Files and records that are not text in the given encoding."""
    unlisted: int = 0
    """Documents that are not in the split file."""
    near_duplicate_groups: int = 0
    """Groups of two or more near-duplicate documents."""
    largest_near_duplicate_group: int = 0
    near_duplicates_across_splits: int = 0
    """Documents with a near-duplicate in another split, because their splits were given."""
    already_there: int = 0
    """Documents that were skipped because the cache has them."""
    elsewhere: int = 0
    """Documents that were given one split but belong to another, because the cache has them or a
    near-duplicate of them there."""
    corpus_sha256: str = ""
    """SHA-256 of the settings and of each document's name, split and rendered bytes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)
