"""How a carry-on is trained, and the file that may say so."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedcache.carryon.branch.config import CarryOnConfig, check_keys, check_types
from embedcache.errors import UsageError, nearest

LOSSES = ("auto", "exact", "shortlist")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
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

    carryon: CarryOnConfig = field(default_factory=CarryOnConfig)
    epochs: int = 4
    lr: float = 2e-3
    warmup: float = 0.05
    batch_tokens: int | None = None
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    loss: str = "auto"
    samples: int | None = None
    patience: int = 2
    seed: int = 0
    order_seed: int | None = None
    documents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for values outside their range or of another type."""
        check_types(self)
        for name in ("epochs", "patience", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be above 0 and finite, found {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay must be 0 or above, found {self.weight_decay}")
        if not 0 <= self.beta2 < 1:
            raise UsageError(f"beta2 must be in [0, 1), found {self.beta2}")
        for name, seed in (("seed", self.seed), ("order_seed", self.order)):
            if not 0 <= seed < 2**31:
                raise UsageError(f"{name} must be from 0 to 2**31 - 1, found {seed}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share of all tokens in [0, 1), found {self.warmup}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise UsageError(f"batch_tokens must be at least 1, found {self.batch_tokens}")
        if self.loss not in LOSSES:
            raise UsageError(
                f"loss is one of {', '.join(LOSSES)}, found '{self.loss}'."
                f"{nearest(self.loss, LOSSES)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready values."""
        return asdict(self) | {
            "carryon": self.carryon.to_dict(),
            "documents": list(self.documents),
        }

    @property
    def order(self) -> int:
        """The seed of order and draws."""
        return self.seed if self.order_seed is None else self.order_seed

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainConfig:
        """Parse a configuration; unknown keys raise ``UsageError`` naming the nearest known one."""
        check_keys(value, cls, "training")
        carryon = CarryOnConfig.from_dict(value.get("carryon", {}))
        documents = value.get("documents", [])
        if not isinstance(documents, (list, tuple)) or not all(
            isinstance(pattern, str) for pattern in documents
        ):
            raise UsageError(
                f"documents must be a list of patterns, such as ['alice/*'], found {documents!r}"
            )
        return cls(**(value | {"carryon": carryon, "documents": tuple(documents)}))

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
