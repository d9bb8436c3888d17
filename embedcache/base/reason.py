"""Another library's error, short enough to stand inside one of ours."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Return the first line that ``error`` says, ending in a full stop.

    >>> reason(ValueError("no such thing\\nLong advice follows"))
    'no such thing.'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:") + "."
