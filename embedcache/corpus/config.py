"""The settings of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from embedcache.corpus.render.templates import template_fields
from embedcache.errors import UsageError, nearest

POLICIES = ("error", "skip")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """What a corpus is read from, and how it is rendered, cut and split.

    A cache stores these settings verbatim.

    Raises:
        UsageError: a setting has a wrong value, or two settings contradict each other.
    """

    sources: tuple[str, ...]
    """Files, folders, glob patterns, ``hf:org/name`` or ``stdlib:``, in reading order."""
    dev_sources: tuple[str, ...] = ()
    """Sources of dev; no document of ``sources`` is then dev."""
    test_sources: tuple[str, ...] = ()
    """Sources of test; no document of ``sources`` is then test."""
    split_file: str | None = None
    """JSON file ``{"train": [names], "dev": [names], "test": [names]}``; others are skipped."""
    dev_fraction: float = 0.05
    """Fraction of the documents of ``sources`` that become dev."""
    test_fraction: float = 0.1
    """Fraction of the documents of ``sources`` that become test."""
    split_seed: int = 0
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
    undecodable: str = "error"
    """What to do with a file or line in another encoding: ``error`` or ``skip``."""
    context: int = 1024
    """Largest number of tokens of a sequence."""
    min_tokens: int = 16
    """Sequences of plain text with fewer tokens are dropped."""
    limit_documents: int | None = None
    """Stop after this many documents; ``sources``, dev and test sources are counted separately."""
    limit_tokens: int | None = None
    """Stop after the sequence that reaches this many tokens, counted like ``limit_documents``."""
    max_tokens_per_document: int | None = None
    """Keep only this many tokens of each document, from its start."""

    def __post_init__(self) -> None:
        for name in ("sources", "dev_sources", "test_sources"):
            _check_sources(name, getattr(self, name))
        if not self.sources:
            raise UsageError("Expected at least one source, found none. Give a file or a folder.")
        if self.split_file is not None and (self.dev_sources or self.test_sources):
            raise UsageError(
                "Expected a split file or dev and test sources, found both. Give one of them."
            )
        self._check_splits()
        self._check_fields()
        self._check_reading()
        self._check_sizes()

    @property
    def fractions(self) -> tuple[float, float]:
        """Fractions of ``sources`` that become dev and test: 0 for a split with its own sources."""
        return (
            0.0 if self.dev_sources else self.dev_fraction,
            0.0 if self.test_sources else self.test_fraction,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CorpusConfig:
        """Return the settings that `to_dict` wrote; raise ``UsageError`` for an unknown key."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"Unknown corpus setting '{key}'.{nearest(key, known)}")
        if "sources" not in values:
            raise UsageError("Expected the corpus setting 'sources', found none.")
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**settings)

    def _check_splits(self) -> None:
        for name in ("dev_fraction", "test_fraction"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise UsageError(f"Expected {name} from 0 to less than 1, found {value!r}.")
        if self.dev_fraction + self.test_fraction >= 1:
            raise UsageError(
                "Expected dev_fraction + test_fraction below 1, so that train is left; found "
                f"{self.dev_fraction} + {self.test_fraction}."
            )
        if not _is_whole(self.split_seed):
            raise UsageError(
                f"Expected split_seed to be a whole number, found {self.split_seed!r}."
            )

    def _check_fields(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            given, missing = (
                ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            )
            raise UsageError(
                f"Expected a prompt and a completion, found only the {given}. "
                f'Set `{missing}=` to a template such as "{{field}}".'
            )
        ways = {
            "text_field": self.text_field,
            "prompt and completion": self.prompt,
            "messages_field": self.messages_field,
        }
        given_ways = [name for name, value in ways.items() if value is not None]
        if len(given_ways) > 1:
            raise UsageError(f"Expected one of {' or '.join(given_ways)}, found all of them.")
        if self.prompt is not None and self.completion is not None:
            template_fields(self.prompt, "prompt")
            if not template_fields(self.completion, "completion"):
                raise UsageError(
                    f"Expected a completion that names a field, found {self.completion!r}. "
                    'Set `completion=`, for example, to "{answer}".'
                )

    def _check_reading(self) -> None:
        if self.undecodable not in POLICIES:
            raise UsageError(
                f"Expected undecodable to be 'error' or 'skip', found {self.undecodable!r}."
                f"{nearest(str(self.undecodable), POLICIES)}"
            )
        try:
            "a".encode(self.encoding)
        except (LookupError, TypeError) as error:
            raise UsageError(
                f"Expected an encoding that Python knows, found {self.encoding!r}. "
                "Set `encoding=`, for example, to latin-1."
            ) from error

    def _check_sizes(self) -> None:
        if not _is_whole(self.context) or self.context < 2:
            raise UsageError(f"Expected a context of at least 2 tokens, found {self.context!r}.")
        if not _is_whole(self.min_tokens) or not 2 <= self.min_tokens <= self.context:
            raise UsageError(
                f"Expected min_tokens from 2 to the context of {self.context}, "
                f"found {self.min_tokens!r}. "
                f"Set `min_tokens=`, for example, to {min(16, self.context)}."
            )
        for name in ("limit_documents", "limit_tokens", "max_tokens_per_document"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise UsageError(f"Expected {name} of at least 1 or none, found {value!r}.")


def _check_sources(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        raise UsageError(f"Expected {name} to be a tuple of paths or names, found {value!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
