"""The errors that embedcache raises for problems that a user can fix.

Each message says what was expected, what was found and how to fix it. A command prints the message
as one line on stderr and exits with the error's ``exit_code``. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmbedcacheError(Exception):
    """Base class of the errors that a user can fix."""

    exit_code = 1


class UsageError(EmbedcacheError):
    """An argument or setting is wrong; no work was done."""

    exit_code = 2


class CorpusError(EmbedcacheError):
    """The corpus is empty or cannot be read: a path or field is missing, an encoding is wrong."""


class BaseModelError(EmbedcacheError):
    """The base is not found, is not a causal language model, or has no such tap."""


class IdentityError(EmbedcacheError):
    """Two artefacts do not belong together, such as a carry-on and another base."""


class CacheError(EmbedcacheError):
    """A cache is incomplete, damaged or of a newer schema, or the directory is no cache."""


class OutputError(EmbedcacheError):
    """The output cannot be written: other files are there, it is locked, or the disk is full."""


class NumericsError(EmbedcacheError):
    """Values are not finite, or batched results differ from unbatched ones."""


class DeviceMemoryError(EmbedcacheError):
    """The work does not fit into the device's memory or into the given budget."""


class CarryOnError(EmbedcacheError):
    """A carry-on directory is missing, incomplete, damaged or of a newer schema."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the most similar known word, or an empty string.

    >>> nearest("widht", ["width", "blocks"])
    " Did you mean 'width'?"
    >>> nearest("zzz", ["width"])
    ''
    """
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
