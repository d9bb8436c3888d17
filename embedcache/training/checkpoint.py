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
from embedcache.files import publish_bytes

CHECKPOINT = "checkpoint.safetensors"


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run is. With the weights and the optimiser's moments, all that a resume needs.

    ``position`` is the number of batches done in ``epoch``; the epoch's sums are of its training
    loss. Times are not part of it: they are measured, not computed.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    tokens: int = 0
    epoch_loss: float = 0.0
    epoch_targets: int = 0
    base_dev: float | None = None
    best_dev: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path,
    state: TrainState,
    model: torch.nn.Module,
    best: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    request: dict[str, Any],
) -> None:
    """Publish the state, the current and the best weights and the optimiser's moments."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    metadata = {"state": json.dumps(asdict(state)), "request": json.dumps(request, sort_keys=True)}
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    publish_bytes(path, save(stored, metadata))


def read_request(path: Path) -> dict[str, Any]:
    """Return what the checkpointed run was asked for; raises ``CarryOnError`` if damaged."""
    with _reading(path) as file:
        value: dict[str, Any] = json.loads(file.metadata()["request"])
        return value


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Restore weights and moments in place; return the state and the best weights."""
    with _reading(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TrainState(**json.loads(file.metadata()["state"]))
        model.load_state_dict(_under(tensors, "model."))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        return state, _under(tensors, "best.")


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


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
