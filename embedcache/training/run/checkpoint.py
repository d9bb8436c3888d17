"""The folder of a training run: its checkpoint, its metrics, and whether a run may write there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from embedcache.carryon.saving import CONFIG_FILE, WEIGHTS_FILE
from embedcache.errors import CarryOnError, OutputError
from embedcache.store.files import LOCK, publish_bytes
from embedcache.training.run.report import CARD_FILE, PLOT_FILE

CHECKPOINT = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
PUBLISHED = (CHECKPOINT, METRICS_FILE, PLOT_FILE, CARD_FILE, WEIGHTS_FILE, CONFIG_FILE)
"""Files that a run writes into its folder, each whole."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The progress of a run. With weights and moments, it is all that resuming needs.

    Attributes:
        epoch: finished epochs.
        position: batches that were trained on in the current epoch.
        step: optimiser steps, and ``tokens`` that they saw, since the start.
        epoch_loss: sum of the training loss in the current epoch, over ``epoch_targets`` targets.
        base_dev: the base's cross-entropy on dev.
        best_dev: the lowest cross-entropy on dev, after ``best_epoch``; ``best_estimate`` is what
            the shortlists estimated there.
        seconds: time of the steps so far, and ``waited``, the part spent waiting for batches.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    tokens: int = 0
    epoch_loss: float = 0.0
    epoch_targets: int = 0
    base_dev: float | None = None
    best_dev: float | None = None
    best_estimate: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    waited: float = 0.0


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run's state, current and best weights, and the optimiser's moments."""

    state: TrainState
    weights: Tensors
    best: Tensors
    moments: Tensors


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, request: dict[str, Any]) -> None:
    """Write a checkpoint together with the run's request (see `check_out`)."""
    tensors = {
        f"{part}.{name}": value
        for part in ("weights", "best", "moments")
        for name, value in getattr(checkpoint, part).items()
    }
    state = json.dumps(asdict(checkpoint.state))
    metadata = {"state": state, "request": json.dumps(request, sort_keys=True)}
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    publish_bytes(path, save(stored, metadata))


def read_request(path: Path) -> dict[str, Any]:
    """Return the request of a checkpoint; raises ``CarryOnError`` if the file is damaged."""
    with _reading(path) as file:
        value: dict[str, Any] = json.loads(file.metadata()["request"])
        return value


def load_checkpoint(path: Path, model: torch.nn.Module) -> Checkpoint:
    """Return a checkpoint, and load its weights into ``model``."""
    with _reading(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TrainState(**json.loads(file.metadata()["state"]))
        weights, best, moments = (
            _under(tensors, f"{part}.") for part in ("weights", "best", "moments")
        )
        model.load_state_dict(weights)
        return Checkpoint(state=state, weights=weights, best=best, moments=moments)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a checkpoint; raises ``CarryOnError`` for a file that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CarryOnError(
            f"the checkpoint {path} cannot be read ({error}). Delete its folder and train again."
        ) from error


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


class Metrics:
    """The metrics of a run: JSON lines, one for each logged step or epoch.

    On resuming, rows later than the checkpoint are dropped.
    """

    def __init__(self, path: Path, *, resume: TrainState | None):
        self._path = path
        kept = [] if resume is None else [row for row in self.rows() if _is_before(row, resume)]
        publish_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, *, step: int, **values: Any) -> None:
        """Append one row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows except a last one that a crash cut short."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _is_before(row: dict[str, Any], state: TrainState) -> bool:
    """Say whether a row was written before a checkpoint with that state."""
    if "dev_loss" in row:  # a row of a whole epoch; the base's has epoch 0
        return bool(row["epoch"] <= state.epoch)
    return bool(row["step"] <= state.step)


def check_out(out: Path, request: dict[str, Any]) -> None:
    """Raise ``OutputError`` unless ``out`` is absent, empty, or holds this run, interrupted.

    ``request`` is all that a checkpoint must have been made with to be resumed: the cache, the
    configuration, the kind of device and the number of processes.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(
            f"`out=` is a folder for the carry-on, and {out} is a file: pass another one"
        )
    if (out / CONFIG_FILE).is_file():
        raise OutputError(
            f"{out} already holds a finished carry-on: pass another `out=`, or delete the folder"
        )
    checkpoint = out / CHECKPOINT
    if checkpoint.is_file():
        # The checkpoint's request is read from JSON, where tuples are lists.
        old, new = read_request(checkpoint), json.loads(json.dumps(request))
        for key in new:
            if key == "cache" and old.get(key) != new[key]:
                raise OutputError(
                    f"{out} holds a run on another cache (manifest {str(old.get(key))[:12]}, now "
                    f"{new[key][:12]}), or on this one before documents were added or deleted. "
                    "Pass another `out=` to train on the cache as it is. The old run can only be "
                    "resumed on a copy of the cache as it was."
                )
            if old.get(key) != new[key]:
                raise OutputError(
                    f"{out} holds a run with another {key}: {_difference(old.get(key), new[key])}. "
                    "Pass the old value to resume, or another `out=`."
                )
    elif out.is_dir() and (
        found := sorted(
            p.name
            for p in out.iterdir()
            if p.name not in (METRICS_FILE, LOCK) and not is_partial(p)
        )
    ):
        raise OutputError(
            f"{out} holds other files ({', '.join(found[:3])}): expected an empty or new folder. "
            "Pass another `out=`."
        )


def is_partial(path: Path) -> bool:
    """Say whether a killed run left this file half-written."""
    return path.name.endswith(".partial") and path.name.startswith(
        tuple(f".{name}." for name in PUBLISHED)
    )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if old.get(key) != new[key]:
                return f"{key} was {_difference(old.get(key), new[key])}"
    return f"{old!r}, now {new!r}"
