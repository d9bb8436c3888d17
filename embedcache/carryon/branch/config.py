"""What a carry-on is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from embedcache.errors import UsageError, nearest

BRIDGE_BITS = (16, 8, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOnConfig:
    """The shape of a carry-on: one dial, ``width``, derives most of the rest.

    Attributes:
        width: width R of the branch.
        blocks: number of transformer blocks in the branch.
        head_width: width of an attention head; must divide ``width`` and be even. 0 becomes 64
            where that divides it, else 32.
        mlp_ratio: width of the feed-forward layer over ``width``.
        gate: whether the output is gated by g in (0, 1), per element.
        token_input: whether the base's frozen token embedding is a second input.
        taps: the base's layers that are read; ``final`` must be among them.
        bridge_bits: precision at which embeddings cross the bridge: 16 leaves them as they are,
            8 and 4 quantise them symmetrically per token.

    Source: GPT Carry-On, arXiv 2504.07513.
    """

    width: int = 64
    blocks: int = 2
    head_width: int = 0
    mlp_ratio: int = 4
    gate: bool = True
    token_input: bool = False
    taps: tuple[str, ...] = ("final",)
    bridge_bits: int = 16

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a shape that cannot be built."""
        check_types(self)
        if self.head_width == 0:
            object.__setattr__(self, "head_width", 32 if self.width % 64 else 64)
        for name in ("width", "blocks", "head_width", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.width % self.head_width or self.head_width % 2:
            raise UsageError(
                f"head_width must be even and divide width: found head_width {self.head_width} "
                f"and width {self.width}. Try width {-(-self.width // 32) * 32} with head_width 32."
            )
        if "final" not in self.taps:
            raise UsageError(
                f"taps must hold 'final', the input of the head: found {', '.join(self.taps)}"
            )
        if len(set(self.taps)) < len(self.taps):
            raise UsageError(f"a tap is named twice in {', '.join(self.taps)}: name each once")
        if self.bridge_bits not in BRIDGE_BITS:
            raise UsageError(f"bridge_bits must be 16, 8 or 4, found {self.bridge_bits}")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready values."""
        return asdict(self) | {"taps": list(self.taps)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> CarryOnConfig:
        """Parse a configuration; unknown keys raise ``UsageError`` naming the nearest known one."""
        check_keys(value, cls, "carry-on")
        taps = value.get("taps", ["final"])
        if not isinstance(taps, (list, tuple)) or not all(isinstance(tap, str) for tap in taps):
            raise UsageError(f"taps must be a list of names, such as ['final'], found {taps!r}")
        return cls(**(value | {"taps": tuple(taps)}))


def check_keys(value: Any, cls: Any, what: str) -> None:
    """Raise ``UsageError`` unless ``value`` is a table of fields of the dataclass ``cls``."""
    if not isinstance(value, dict):
        raise UsageError(
            f"the {what} settings must be a table of names and values, found {value!r}"
        )
    known = [field.name for field in fields(cls)]
    for key in value:
        if key not in known:
            raise UsageError(
                f"unknown {what} setting '{key}'.{nearest(key, known)} Known: {', '.join(known)}"
            )


_PLAIN = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_types(config: Any) -> None:
    """Raise ``UsageError`` for a field of a dataclass that is not of the plain type it states."""
    for field in fields(config):
        stated, _, optional = str(field.type).partition(" | ")
        value = getattr(config, field.name)
        if stated not in _PLAIN or (optional == "None" and value is None):
            continue
        if not isinstance(value, _PLAIN[stated]) or (isinstance(value, bool) and stated != "bool"):
            raise UsageError(f"{field.name} must be of type {stated}, found {value!r}")
