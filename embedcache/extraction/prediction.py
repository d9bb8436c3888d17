"""What an extraction is expected to take, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from embedcache.cache.codecs.integers import codec_name
from embedcache.cache.format.layout import DEFAULT_BITS, ExtractSettings
from embedcache.errors import OutputError
from embedcache.units import duration, size

BITS = {"bf16": 12.6, "int8": 8.0}
"""Upper estimates of stored bits a value; real embeddings take 11.0 in bf16 and 4.5 in int8."""
FLOOR = 0.5
"""Share of the upper estimate that no cache stays below."""


class RoomError(OutputError):
    """The disk is too small for what is about to be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an extraction will hold and need. ``_to_go`` is without what is there already."""

    tokens: dict[str, int]
    """By split."""
    tokens_to_go: int
    bytes: int
    """Of the finished cache: every file, the head and the token embedding among them."""
    bytes_to_go: int
    seconds: float
    """From when the base is loaded to the commit of the last block: calibrating, measuring, storing
    what is kept of the base, computing and writing what is to go."""
    tokens_per_second: float
    measured_tokens: int
    """Tokens that were computed to say so."""
    free_bytes: int

    def __str__(self) -> str:
        """Return the prediction as one line."""
        whole = f" ({size(self.bytes)} when finished)" if self.bytes_to_go < self.bytes else ""
        return (
            f"{self.tokens_to_go:,} tokens to go: about {size(self.bytes_to_go)} to write{whole}, "
            f"{duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s; "
            f"{size(self.free_bytes)} of disk free"
        )


def free_disk(out: Path) -> int:
    """Return the free bytes of the disk that ``out`` is on, or will be."""
    existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free


def require_floor(
    tokens: dict[str, int], settings: ExtractSettings, hidden: int, out: Path
) -> None:
    """Raise ``RoomError`` where the disk is too small for sure, before the base is loaded.

    What a codec makes of a corpus is known only once some of it is encoded: until then only half
    of its upper estimate is held against the disk, so that nothing is refused that fits.
    """
    bits = sum(
        count * BITS.get(codec_name(name, settings.codec), settings.bits or DEFAULT_BITS)
        for name, count in tokens.items()
    )
    _require(int(FLOOR * bits / 8 * hidden * len(settings.taps)), free_disk(out), out, "at least")


def require_room(prediction: Prediction, out: Path) -> None:
    """Raise ``RoomError`` where the disk has less than what is predicted to be written."""
    _require(prediction.bytes_to_go, prediction.free_bytes, out, "about")


def _require(needed: int, free: int, out: Path, how_sure: str) -> None:
    if needed > free:
        raise RoomError(
            f"the cache needs {how_sure} {needed / 1e9:.2f} GB more and the disk of {out} has "
            f"{free / 1e9:.2f} GB free: give another --out, --codec int8, or --limit-tokens"
        )
