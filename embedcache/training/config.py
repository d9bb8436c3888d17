"""The configuration of a training run, and the files that hold one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import InstanceOf

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.registry import config_from_dict, kind_named
from embedcache.config import (
    Config,
    Count,
    Fraction,
    Names,
    NotNegative,
    Positive,
    Seed,
    split_settings,
)
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainConfig(Config):
    """The settings of one training run.

    Attributes:
        carryon: the configuration of the carry-on, whose kind it gives.
        epochs: passes over the train split.
        lr: peak learning rate of AdamW.
        warmup: share of all tokens over which the learning rate rises linearly; after that it falls
            to 0 along a cosine.
        batch_tokens: tokens of a step. None means a 64th of the train split, but at least 2,048 and
            at most 16,384.
        weight_decay: weight decay of AdamW, on matrices only.
        beta2: decay of AdamW's second moment; that of the first moment is 0.9.
        clip: largest norm of the gradient.
        loss: ``exact``, ``shortlist`` (see `embedcache.loss`), or ``auto``: a shortlist if the
            vocabulary is at least 8 times the sampled tokens.
        samples: approximate number of tokens that a shortlist samples in addition to its labels.
            None means 2,048, or 256 where the cache stores top ids.
        patience: epochs without a better dev loss after which training stops.
        seed: seed of the initial weights, of the order of documents and of sampling.
        order_seed: seed of order and sampling, if it differs from ``seed``. Carry-ons of one sweep
            with the same order share each batch.
        documents: patterns of the names of the documents that are trained and scored on, as in a
            shell (``*``, ``?``, ``[…]``). Empty means all.
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
        """Seed of the order of documents and of sampling."""
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
        """Return the tokens of a step for a train split of ``train_tokens`` tokens.

        >>> TrainConfig().steps_tokens(100_000), TrainConfig(batch_tokens=512).steps_tokens(10)
        (2048, 512)
        """
        if self.batch_tokens is not None:
            return self.batch_tokens
        return min(16384, max(2048, train_tokens // 64))


def config_from(config: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """Return ``config``, or make a configuration from settings by name.

    Each name is a field of `TrainConfig` or of the carry-on's configuration. The setting ``kind``
    gives the carry-on's kind.

    >>> config_from(None, {"lr": 1e-3, "width": 128}).carryon.width
    128

    Raises ``UsageError`` for an unknown name, naming the nearest known one, and if both a
    configuration and settings are given.
    """
    if config is not None:
        if settings:
            names = ", ".join(f"`{name}=`" for name in settings)
            raise UsageError(
                f"`config=` and settings exclude each other, found both: {names}. Put the settings "
                "into the configuration, or leave `config=` out."
            )
        return config
    named = dict(settings)
    kind = str(named.pop("kind", BranchConfig.kind))
    training, shape = split_settings(named, TrainConfig, kind_named(kind).config)
    if "carryon" not in training:
        training["carryon"] = {"kind": kind, **shape}
    elif shape or "kind" in settings:
        names = ", ".join(f"`{name}=`" for name in settings if name in ("kind", *shape))
        raise UsageError(f"`carryon=` gives the carry-on's settings, found {names} as well")
    return TrainConfig.from_dict(training)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML or YAML file of settings: fields of `TrainConfig`, and a table ``carryon``.

    Raises ``UsageError`` for a file that is missing or malformed.
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
