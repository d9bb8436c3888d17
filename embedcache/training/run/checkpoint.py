"""The whole state of a training run in one safetensors file, published whole."""

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

from embedcache.errors import CarryOnError
from embedcache.store.files import publish_bytes

CHECKPOINT = "checkpoint.safetensors"


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run is. With the weights and the optimiser's moments, all that a resume needs.

    ``position`` is the number of batches done in ``epoch``; the epoch's sums are of its training
    loss. ``seconds`` of training, and those of them that it ``waited`` for batches, are measured.
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
    """A carry-on in training: its state, current and best weights, and the optimiser's moments."""

    state: TrainState
    weights: Tensors
    best: Tensors
    moments: Tensors


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, request: dict[str, Any]) -> None:
    """Publish a checkpoint, and what the run was asked for."""
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
    """Return what the checkpointed run was asked for; raises ``CarryOnError`` if damaged."""
    with _reading(path) as file:
        value: dict[str, Any] = json.loads(file.metadata()["request"])
        return value


def load_checkpoint(path: Path, model: torch.nn.Module) -> Checkpoint:
    """Return what `save_checkpoint` published; the weights are also put into ``model``."""
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
    """Open a checkpoint; raise ``CarryOnError`` unless all is as `save_checkpoint` left it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CarryOnError(
            f"the checkpoint {path} cannot be read ({error}): delete its folder and train again"
        ) from error


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
