"""A carry-on on disk: ``carryon_config.json``, ``carryon.safetensors`` and a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from embedcache import __version__
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.protocol import CarryOn
from embedcache.carryon.registry import build, config_from_dict
from embedcache.errors import CarryOnError, UsageError
from embedcache.store.files import publish_bytes, publish_json

FORMAT = 1
CONFIG_FILE = "carryon_config.json"
WEIGHTS_FILE = "carryon.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOnRecord:
    """The configuration of a carry-on and the record of its training, without weights.

    ``base`` is the identity of the base it belongs to; ``training``, ``cache`` and ``results``
    record how it was trained, and the outcome.
    """

    config: CarryOnConfig
    base: dict[str, Any]
    training: dict[str, Any]
    cache: dict[str, Any]
    results: dict[str, Any]


def save_carryon(folder: Path, model: CarryOn, record: CarryOnRecord) -> None:
    """Publish weights, then the configuration that makes the folder a carry-on."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    publish_bytes(folder / WEIGHTS_FILE, save(weights, {"format": "pt"}))
    publish_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "embedcache": __version__,
            "carryon": record.config.to_dict(),
            "base": record.base,
            "training": record.training,
            "cache": record.cache,
            "results": record.results,
        },
    )


def read_record(folder: Path) -> CarryOnRecord:
    """Read a carry-on's configuration; raises ``CarryOnError`` if absent, damaged or newer."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CarryOnError(
            f"{folder} is not a finished carry-on: expected {CONFIG_FILE} in it. Make one with: "
            f"embedcache train CACHE --out {folder}"
        )
    try:
        value = json.loads(path.read_text())
        if value["format"] > FORMAT:
            raise CarryOnError(
                f"{path} has format {value['format']}; this embedcache reads up to {FORMAT}. "
                "Upgrade with: pip install --upgrade embedcache"
            )
        if not isinstance(value["base"]["hidden_size"], int):
            raise TypeError("the base's hidden_size is no number")
        return CarryOnRecord(
            config=config_from_dict(value["carryon"]),
            base=value["base"],
            training=value["training"],
            cache=value["cache"],
            results=value["results"],
        )
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise CarryOnError(f"{path} is damaged ({error}): train the carry-on again") from error


def load_carryon(folder: Path) -> tuple[CarryOn, CarryOnRecord]:
    """Load a carry-on, in evaluation mode, on the CPU, in float32.

    Raises ``CarryOnError`` if a weight is missing, unknown, not finite or of another shape.
    """
    record = read_record(folder)
    model = build(record.config, record.base["hidden_size"])
    path = folder / WEIGHTS_FILE
    try:
        weights = load(path.read_bytes())
        model.load_state_dict(weights, strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CarryOnError(
            f"{path} does not hold the weights that {CONFIG_FILE} describes ({error}): train the "
            "carry-on again"
        ) from error
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise CarryOnError(f"{path} holds weights that are not finite: train the carry-on again")
    return model.eval(), record
