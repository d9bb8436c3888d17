"""How a carry-on is trained, and the file that may say so."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import InstanceOf

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.registry import config_from_dict
from embedcache.config import Config, Count, Fraction, Names, NotNegative, Positive, Seed
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainConfig(Config):
    """The settings of one training run.

    Attributes:
        carryon: the shape of what is trained.
        epochs: passes over the train split.
        lr: peak learning rate of AdamW.
        warmup: share of all tokens over which the rate rises linearly; then a cosine falls to 0.
        batch_tokens: tokens of a step; None takes a 64th of the train split, 2,048 to 16,384.
        weight_decay: AdamW's, on matrices only.
        beta2: AdamW's second moment decay; the first is 0.9.
        clip: largest global norm of the gradient.
        loss: ``exact``, ``shortlist`` (see `embedcache.loss`), or ``auto``: a shortlist where the
            vocabulary is much longer.
        samples: tokens that a shortlist draws besides its labels, about; None means 2,048, or 256
            where the cache stores top ids.
        patience: epochs without a better dev loss before training stops.
        seed: of initial weights, order and draws.
        order_seed: of order and draws alone, where they should not follow ``seed``: carry-ons that
            see the same batches are trained together from one reading.
        documents: patterns of names, as in a shell (``*``, ``?``, ``[…]``), of the documents that
            are trained and scored on; empty means all.
    """

    carryon: InstanceOf[CarryOnConfig] = field(default_factory=BranchConfig)
    epochs: Count = 4
    lr: Positive = 2e-3
    warmup: Fraction = 0.05
    batch_tokens: Count | None = None
    weight_decay: NotNegative = 0.01
    beta2: Fraction = 0.99
    clip: Positive = 1.0
    loss: Literal["auto", "exact", "shortlist"] = "auto"
    samples: Count | None = None
    patience: Count = 2
    seed: Seed = 0
    order_seed: Seed | None = None
    documents: Names = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as values that JSON can hold."""
        return Config.to_dict(self) | {"carryon": self.carryon.to_dict()}

    @property
    def order(self) -> int:
        """The seed of order and draws."""
        return self.seed if self.order_seed is None else self.order_seed

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from values by name; ``carryon`` may be a table of its settings.

        Raises ``UsageError`` for a name that is unknown, naming the nearest known one.
        """
        given = values.get("carryon") if isinstance(values, Mapping) else None
        if given is not None and not isinstance(given, CarryOnConfig):
            values = {**values, "carryon": config_from_dict(given)}
        return super(TrainConfig, cls).from_dict(values)

    def steps_tokens(self, train_tokens: int) -> int:
        """Return the tokens of a step for a train split of that size.

        >>> TrainConfig().steps_tokens(100_000), TrainConfig(batch_tokens=512).steps_tokens(10)
        (2048, 512)
        """
        if self.batch_tokens is not None:
            return self.batch_tokens
        return min(16384, max(2048, train_tokens // 64))


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML or YAML file of settings: keys of `TrainConfig`, and a table ``carryon``.

    Raises ``UsageError`` for a missing or malformed file.
    """
    if not path.is_file():
        raise UsageError(f"no such configuration file: {path}")
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise UsageError(f"{path} must end in .toml, .yaml or .yml")
    import yaml

    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if kind == "TOML" else yaml.safe_load(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold settings by name, found a {type(value).__name__}")
    return value
