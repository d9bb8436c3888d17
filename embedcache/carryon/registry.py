"""The kinds of carry-on: each folder of `embedcache.carryon` that registers one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedcache.carryon.config import CarryOnConfig
from embedcache.errors import UsageError, nearest

if TYPE_CHECKING:
    from embedcache.carryon.protocol import CarryOn

_KINDS: dict[str, Kind] = {}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of carry-on.

    Attributes:
        config: the class of its configurations; ``config.kind`` is the kind's name.
        model: where its module is defined, ``"package.module:Class"``; it is imported when first
            built, so that a configuration can be made without PyTorch.
    """

    config: type[CarryOnConfig]
    model: str

    def model_class(self) -> type[CarryOn]:
        """Import and return the class of its module."""
        module, _, name = self.model.partition(":")
        found: type[CarryOn] = getattr(importlib.import_module(module), name)
        return found


def register(kind: Kind) -> None:
    """Make a kind known by its configuration's ``kind``."""
    _KINDS[kind.config.kind] = kind


def kinds() -> Mapping[str, Kind]:
    """Return all kinds by name, after importing every folder of `embedcache.carryon`."""
    package = importlib.import_module("embedcache.carryon")
    for found in pkgutil.iter_modules(package.__path__, "embedcache.carryon."):
        if found.ispkg:
            importlib.import_module(found.name)
    return _KINDS


def kind_named(name: str) -> Kind:
    """Return a kind; raises ``UsageError`` for an unknown name."""
    known = kinds()
    if name not in known:
        raise UsageError(
            f"`kind=` is one of {', '.join(sorted(known))}, found '{name}'.{nearest(name, known)}"
        )
    return known[name]


def config_from_dict(values: Mapping[str, Any], *, kind: str = "branch") -> CarryOnConfig:
    """Make a carry-on's configuration from values by name; ``kind`` names its kind."""
    if not isinstance(values, Mapping):
        raise UsageError(f"a carry-on's settings are a table of names and values, found {values!r}")
    named = str(values.get("kind", kind))
    return kind_named(named).config.from_dict(values)


def build(config: CarryOnConfig, hidden: int) -> CarryOn:
    """Return a new carry-on for a base whose embeddings are ``hidden`` wide; it equals the base."""
    return kind_named(config.kind).model_class()(config, hidden)
