"""The base class of the configurations of carry-ons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from embedcache.config import Config, Names
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CarryOnConfig(Config):
    """Base of the configurations of all kinds; each kind has its own in its folder.

    Attributes:
        taps: the layers of the base whose embeddings the carry-on reads, ``final`` among them.
    """

    kind: ClassVar[str] = ""
    """The kind's name, as in ``--kind``; the name of its folder."""

    taps: Names = ("final",)

    def check(self) -> None:
        """Raise ``UsageError`` for taps without ``final``, the head's input, or named twice."""
        if "final" not in self.taps:
            raise UsageError(
                f"`taps=` must hold 'final', the input of the head; found {', '.join(self.taps)}"
            )
        if len(set(self.taps)) < len(self.taps):
            raise UsageError(f"`taps=` names a tap twice: {', '.join(self.taps)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with its kind, as values that JSON can hold."""
        return {"kind": self.kind} | Config.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration of this kind from values by name; ``kind`` may be among them.

        Raises ``UsageError`` for another kind, and for a name that is unknown.
        """
        if isinstance(values, Mapping) and values.get("kind") == cls.kind:
            values = {name: value for name, value in values.items() if name != "kind"}
        return super(CarryOnConfig, cls).from_dict(values)

    @property
    def base_arrays(self) -> frozenset[str]:
        """Arrays of the base that the carry-on needs: ``head``, ``token_embedding``."""
        return frozenset({"head"})

    @property
    def attention_head_width(self) -> int:
        """Width of an attention head, which decides which attention kernels can run; 0 for none."""
        return 0

    def describe(self) -> str:
        """Return the shape in a few words, for a model card."""
        return f"{self.kind}, reading {', '.join(self.taps)}"

    def values_per_token(self, hidden: int) -> int:
        """Return approximately how many values training keeps per token of a base of that width."""
        raise NotImplementedError
