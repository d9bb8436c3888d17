"""Bytes and seconds in words."""

from __future__ import annotations


def size(count: float) -> str:
    """Return bytes for a human.

    >>> size(1536), size(2_500_000)
    ('1.5 kB', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Return a time for a human.

    >>> duration(0.2), duration(75), duration(4000), duration(9e5)
    ('0.2 s', '75 s', '67 min', '10.4 days')
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, length, most in (("min", 60, 100), ("h", 3600, 48)):
        if seconds / length < most:
            return (
                f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} h"
            )
    return f"{seconds / 86400:.1f} days"
