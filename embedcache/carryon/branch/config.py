"""The shape of a branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from embedcache.carryon.config import CarryOnConfig
from embedcache.config import Count, Flag, Size
from embedcache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BranchConfig(CarryOnConfig):
    """The shape of a branch: one dial, ``width``, derives most of the rest.

    Attributes:
        taps: layers of the base whose embeddings the branch reads; ``final`` must be among them.
        width: width R of the branch.
        blocks: number of transformer blocks.
        head_width: width of an attention head. It must divide ``width`` and be even. 0 means 64
            where 64 divides ``width``, else 32.
        mlp_ratio: width of the feed-forward layer divided by ``width``.
        gate: whether a gate g in (0, 1) multiplies each element of the output.
        token_input: whether the base's frozen token embedding is a second input.
        bridge_bits: bits of each value that crosses the bridge. 16 leaves embeddings as they are;
            8 and 4 quantise them symmetrically with one scale per token.

    Source: GPT Carry-On, arXiv 2504.07513.
    """

    kind: ClassVar[str] = "branch"

    width: Count = 64
    blocks: Count = 2
    head_width: Size = 0
    mlp_ratio: Count = 4
    gate: Flag = True
    token_input: Flag = False
    bridge_bits: Literal[16, 8, 4] = 16

    def check(self) -> None:
        """Raise ``UsageError`` for a shape that cannot be built."""
        CarryOnConfig.check(self)
        if self.head_width == 0:
            object.__setattr__(self, "head_width", 32 if self.width % 64 else 64)
        if self.width % self.head_width or self.head_width % 2:
            raise UsageError(
                f"`head_width=` must be even and divide `width=`: found head_width "
                f"{self.head_width} and width {self.width}. Try width "
                f"{-(-self.width // 32) * 32} with head_width 32."
            )

    @property
    def base_arrays(self) -> frozenset[str]:
        """The head, and the token embedding where the branch reads token ids."""
        return frozenset({"head", "token_embedding"} if self.token_input else {"head"})

    @property
    def attention_head_width(self) -> int:
        """Width of an attention head."""
        return self.head_width

    def describe(self) -> str:
        """Return the shape in a few words."""
        gate = "gated" if self.gate else "no gate"
        ids = "with" if self.token_input else "without"
        return (
            f"branch: width {self.width}, {self.blocks} blocks, {gate}, {ids} token input, "
            f"taps {', '.join(self.taps)}"
        )

    def values_per_token(self, hidden: int) -> int:
        """Return roughly how many values training keeps for each token, for a base that wide."""
        return 12 * hidden + 40 * self.width * self.blocks
