"""What was read, kept and left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def _zeros() -> dict[Split, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass(slots=True)
class CorpusSummary:
    """Counts of one pass over a corpus, right at every moment of it."""

    documents: dict[Split, int] = field(default_factory=_zeros)
    """Documents with at least one sequence, by split."""
    sequences: dict[Split, int] = field(default_factory=_zeros)
    tokens: dict[Split, int] = field(default_factory=_zeros)
    """Tokens of those sequences, special tokens included, by split."""
    target_tokens: dict[Split, int] = field(default_factory=_zeros)
    """Tokens that are targets, by split."""
    files: int = 0
    """Files and data sets opened."""
    dropped_short: int = 0
    """Sequences of plain text below ``min_tokens``."""
    dropped_without_target: int = 0
    """Sequences of pairs and chats that hold nothing to learn."""
    skipped_undecodable: int = 0
    """Files and records that are not in the encoding named."""
    unlisted: int = 0
    """Documents that the split file does not name."""
    near_duplicate_groups: int = 0
    """Groups of two or more documents that are nearly the same."""
    largest_near_duplicate_group: int = 0
    near_duplicates_across_splits: int = 0
    """Documents whose near-duplicate was put in another split, by name or by chance."""
    already_there: int = 0
    """Documents passed over because the cache that they were to be added to has them."""
    elsewhere: int = 0
    """Documents asked into one split whose like, or they themselves, that cache has in another:
    there they went, or stayed."""
    corpus_sha256: str = ""
    """Hash of the settings and of each kept document's name, split and rendered bytes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)
