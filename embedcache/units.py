"""Format and parse sizes in bytes, format seconds, and round numbers up."""

from __future__ import annotations

import re

from embedcache.errors import UsageError


def format_bytes(count: float) -> str:
    """Format a number of bytes.

    >>> format_bytes(1536), format_bytes(2_500_000)
    ('1.5 kB', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def round_up(count: int, multiple: int) -> int:
    """Round a count up to a multiple.

    >>> round_up(5, 4), round_up(8, 4)
    (8, 8)
    """
    return -(-count // multiple) * multiple


def parse_bytes(text: str) -> int:
    """Parse a size such as ``1GB`` or ``0.95 GB`` to bytes; raise ``UsageError`` if it is none.

    >>> parse_bytes("1GB"), parse_bytes("0.5 mb"), parse_bytes("800000")
    (1000000000, 500000, 800000)
    """
    units = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in units:
        raise UsageError(f"a size is a number and a unit, such as 1GB or 800MB; found '{text}'")
    return int(float(match[1]) * units[match[2]])


def format_seconds(seconds: float) -> str:
    """Format a number of seconds.

    >>> [format_seconds(s) for s in (0.2, 75, 4000, 9000, 9e5)]
    ['0.2 s', '75 s', '67 min', '2.5 h', '10.4 days']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
