"""Helpers for tests of suspended processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.fixtures_extract import corpus_config, small_settings

from embedcache.editing.repair import repair
from embedcache.errors import OutputError
from embedcache.extraction.extract import extract

DELETED = "000.txt"
Pause = Callable[[Any, str, int, Callable[[], object]], None]


def run(place: Path, out: Path, **more: Any) -> Any:
    return extract(
        corpus_config(place / "corpus"),
        base=str(place / "base"),
        out=out,
        settings=small_settings(),
        device="cpu",
        **more,
    )


def repaired(place: Path, out: Path) -> Any:
    return repair(out, base=place / "base", device="cpu")


def finishes(call: Callable[[Path, Path], Any], place: Path, out: Path) -> bool:
    """Return whether a call finishes; if it does not, it says why in one message."""
    try:
        call(place, out)
    except OutputError as error:
        assert "was taken over by another process because this one did not renew" in str(error)
        return False
    return True


def nothing_is_left(out: Path) -> bool:
    return not {"leases", ".staging"} & {path.name for path in out.iterdir()}
