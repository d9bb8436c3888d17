"""The settings of a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from embedcache.config import Config, Count, Fraction, Integer, Names
from embedcache.corpus.render.templates import template_fields
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CorpusConfig(Config):
    """What a corpus is read from, and how it is rendered, cut and split.

    A cache stores these settings verbatim.

    Raises:
        UsageError: a setting has a wrong value, or two settings contradict each other.
    """

    sources: Names
    """Files, folders, glob patterns, ``hf:org/name`` or ``stdlib:``, in reading order."""
    dev_sources: Names = ()
    """Sources of dev; no document of ``sources`` is then dev."""
    test_sources: Names = ()
    """Sources of test; no document of ``sources`` is then test."""
    split_file: str | None = None
    """JSON file ``{"train": [names], "dev": [names], "test": [names]}``; others are skipped."""
    dev_fraction: Fraction = 0.05
    """Fraction of the documents of ``sources`` that become dev."""
    test_fraction: Fraction = 0.1
    """Fraction of the documents of ``sources`` that become test."""
    split_seed: Integer = 0
    """Seed of the choice of dev and test documents."""
    text_field: str | None = None
    """Field of a record that holds plain text."""
    prompt: str | None = None
    """Template of the prompt over a record's fields: ``"Question: {question}\\nAnswer: "``."""
    completion: str | None = None
    """Template of the completion, whose tokens are the targets: ``"{answer}"``."""
    messages_field: str | None = None
    """Field of a record that holds a chat, a list of ``{"role": …, "content": …}``."""
    dataset_config: str | None = None
    """Configuration of an ``hf:`` data set to read."""
    dataset_split: str = "train"
    """Split of an ``hf:`` data set to read."""
    encoding: str = "utf-8"
    """Encoding of text files, JSON lines and CSV."""
    undecodable: Literal["error", "skip"] = "error"
    """What to do with a file or line in another encoding: ``error`` or ``skip``."""
    context: Annotated[Integer, Field(ge=2)] = 1024
    """Largest number of tokens of a sequence."""
    min_tokens: Annotated[Integer, Field(ge=2)] = 16
    """Sequences of plain text with fewer tokens are dropped."""
    limit_documents: Count | None = None
    """Stop after this many documents; ``sources``, dev and test sources are counted separately."""
    limit_tokens: Count | None = None
    """Stop after the sequence that reaches this many tokens, counted like ``limit_documents``."""
    max_tokens_per_document: Count | None = None
    """Keep only this many tokens of each document, from its start."""

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict each other."""
        if not self.sources:
            raise UsageError("`sources=` names no file or folder, expected at least one")
        if self.split_file is not None and (self.dev_sources or self.test_sources):
            raise UsageError(
                "expected `split_file=` or `dev_sources=` and `test_sources=`, found both"
            )
        if self.dev_fraction + self.test_fraction >= 1:
            raise UsageError(
                "`dev_fraction=` and `test_fraction=` must sum to less than 1, so that documents "
                f"are left to train on; found {self.dev_fraction} + {self.test_fraction}"
            )
        self._check_fields()
        try:
            "a".encode(self.encoding)
        except LookupError as error:
            raise UsageError(
                f"`encoding=` must be one that Python knows, such as latin-1; found "
                f"{self.encoding!r}"
            ) from error
        if self.min_tokens > self.context:
            raise UsageError(
                f"`min_tokens=` must not exceed `context=` ({self.context}), found "
                f"{self.min_tokens}; try {min(16, self.context)}"
            )

    @property
    def fractions(self) -> tuple[float, float]:
        """Fractions of ``sources`` that become dev and test: 0 for a split with its own sources."""
        return (
            0.0 if self.dev_sources else self.dev_fraction,
            0.0 if self.test_sources else self.test_fraction,
        )

    def _check_fields(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            given, missing = (
                ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            )
            raise UsageError(
                f"expected `prompt=` and `completion=`, found only `{given}=`: add "
                f"`{missing}=`, a template such as '{{field}}'"
            )
        ways = {
            "text_field": self.text_field,
            "prompt and completion": self.prompt,
            "messages_field": self.messages_field,
        }
        given_ways = [name for name, value in ways.items() if value is not None]
        if len(given_ways) > 1:
            raise UsageError(f"expected one of {' or '.join(given_ways)}, found all of them")
        if self.prompt is not None and self.completion is not None:
            template_fields(self.prompt, "prompt")
            if not template_fields(self.completion, "completion"):
                raise UsageError(
                    "`completion=` must name a field of the records, such as '{answer}'; found "
                    f"{self.completion!r}"
                )
