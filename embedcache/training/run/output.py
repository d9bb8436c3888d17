"""The folder that a run writes: whose it is, and what of it a killed run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedcache.carryon.saving import CONFIG_FILE, WEIGHTS_FILE
from embedcache.errors import OutputError
from embedcache.store.files import LOCK
from embedcache.training.run.checkpoint import CHECKPOINT, read_request
from embedcache.training.run.metrics import METRICS_FILE
from embedcache.training.run.report import CARD_FILE, PLOT_FILE

PUBLISHED = (CHECKPOINT, METRICS_FILE, PLOT_FILE, CARD_FILE, WEIGHTS_FILE, CONFIG_FILE)
"""What a run publishes in its folder, whole each time."""


def check_out(out: Path, request: dict[str, Any]) -> None:
    """Raise ``OutputError`` unless ``out`` is absent, empty, or this very run, interrupted."""
    if out.exists() and not out.is_dir():
        raise OutputError(
            f"{out} is a file, expected a folder for the carry-on: give another --out"
        )
    if (out / CONFIG_FILE).is_file():
        raise OutputError(
            f"{out} already holds a finished carry-on: give another --out, or delete it"
        )
    checkpoint = out / CHECKPOINT
    if checkpoint.is_file():
        # Through JSON, as the checkpoint's went: tuples and lists are one.
        old, new = read_request(checkpoint), json.loads(json.dumps(request))
        for key in new:
            if key == "cache" and old.get(key) != new[key]:
                raise OutputError(
                    f"{out} holds a run on another cache (manifest {str(old.get(key))[:12]}, now "
                    f"{new[key][:12]}), or on this one before documents were added or deleted. "
                    "Give another --out to train on what it holds now; the old run goes on over a "
                    "copy of the cache as it was, and over nothing else."
                )
            if old.get(key) != new[key]:
                raise OutputError(
                    f"{out} holds a run with another {key}: {_difference(old.get(key), new[key])}. "
                    "Run with the first to go on, or give another --out."
                )
    elif out.is_dir() and (
        found := sorted(
            p.name
            for p in out.iterdir()
            if p.name not in (METRICS_FILE, LOCK) and not is_partial(p)
        )
    ):
        raise OutputError(
            f"{out} holds something else ({', '.join(found[:3])}): expected an empty or new "
            "folder. Give another --out."
        )


def is_partial(path: Path) -> bool:
    """Whether a file is what a killed run was about to publish."""
    return path.name.endswith(".partial") and path.name.startswith(
        tuple(f".{name}." for name in PUBLISHED)
    )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if old.get(key) != new[key]:
                return f"{key} was {_difference(old.get(key), new[key])}"
    return f"{old!r}, now {new!r}"
