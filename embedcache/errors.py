"""The errors that embedcache raises for what a user can mend.

Each message says what was expected, what was found and what to type instead. A command turns
one into a single line on stderr and its ``exit_code``; anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmbedcacheError(Exception):
    """Base of every error a user can mend."""

    exit_code = 1


class UsageError(EmbedcacheError):
    """A wrong argument or setting, found before any work was done."""

    exit_code = 2


class CorpusError(EmbedcacheError):
    """The corpus cannot be read as asked: a missing path, field or encoding, or nothing in it."""


class BaseModelError(EmbedcacheError):
    """The base cannot be used: not found, not a causal language model, no such tap."""


class IdentityError(EmbedcacheError):
    """Two artefacts that do not belong together, such as a carry-on and another base."""


class CacheError(EmbedcacheError):
    """A cache that is incomplete, damaged, of a newer schema or not a cache at all."""


class OutputError(EmbedcacheError):
    """The output cannot be written: the place holds something else, is locked or too small."""


class NumericsError(EmbedcacheError):
    """Numbers that cannot be trusted: not finite, or batched results unlike unbatched ones."""


class DeviceMemoryError(EmbedcacheError):
    """What is asked for does not fit into the device's memory, or into the budget given."""


class CarryOnError(EmbedcacheError):
    """A carry-on directory that is missing, unfinished, damaged or of a newer schema."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known word, or an empty string.

    >>> nearest("widht", ["width", "blocks"])
    " Did you mean 'width'?"
    >>> nearest("zzz", ["width"])
    ''
    """
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
