"""A memory budget: what a recipe takes, as measured, and the one that is chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from embedcache.device import has_triton
from embedcache.errors import DeviceMemoryError
from embedcache.training.step.settings import Recipe, plain_recipe
from embedcache.units import size

USED = 0.95
"""Share of a budget that a plan counts on; the rest is an allocator's gaps."""
GOOD_TOKENS = {
    "recorded": (1024, 512, 0),
    "plain": (2048, 1024, 512),
    "streamed": (8192, 4096, 2048, 1024, 512, 0),
}
"""Tokens of the parts that are looked for, by how they are computed: smaller ones are slower by the
token. Small ones that are recorded are faster than large ones that are not; where they are
streamed, all of the head goes by for each."""
MORE = 1.1
"""By how much a budget is thought too small where nothing that was tried within it held."""
STEP_TOKENS = 64
"""Parts are a multiple of this."""
EMITTED = 512
"""Positions of which deltas exist at a time within a budget: more would hardly be faster."""
LOGIT_SHARE = 16
"""A budget's part that logits take, at most."""
LEAST_LOGITS, LOGITS_OF_HIDDEN = 1 << 20, 1024
"""Bytes that logits need for a product to be worth while, and those by width for a streamed head's
tiles."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a recipe takes at its peak: whatever the part, and by token of it."""

    fixed: int
    per_token: float

    @classmethod
    def through(cls, measured: Mapping[int, int]) -> Footprint:
        """Return the line through the bytes that parts of two sizes took."""
        (few, least), (many, most) = sorted(measured.items())
        per_token = max(0.0, (most - least) / (many - few))
        return cls(round(most - per_token * many), per_token)

    def at(self, tokens: int) -> int:
        """Return the bytes of a part of so many tokens."""
        return round(self.fixed + self.per_token * tokens)

    def tokens(self, budget: float) -> int:
        """Return the tokens that a budget has room for."""
        room = budget - self.fixed
        return int(room / self.per_token) if self.per_token else (1 << 40 if room >= 0 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A recipe for a budget, and the bytes that it is expected to take, ``per_token`` of a part."""

    recipe: Recipe
    budget: int
    expected: int
    per_token: float = 0.0

    @property
    def leanness(self) -> tuple[bool, bool, bool, int]:
        """What orders plans by how little of the device they take."""
        recipe = self.recipe
        return recipe.offload, recipe.host_head, recipe.recompute, -(recipe.part_tokens or 1 << 40)

    @property
    def part_tokens(self) -> int:
        """Tokens of its parts."""
        assert self.recipe.part_tokens is not None
        return self.recipe.part_tokens

    def smaller(self, longest: int) -> MemoryPlan | None:
        """Return the same with smaller parts; None where they are as long as a sequence may be."""
        if self.part_tokens <= longest:
            return None
        tokens = max(longest, self.part_tokens * 7 // 8 // STEP_TOKENS * STEP_TOKENS)
        return replace(
            self,
            recipe=replace(self.recipe, part_tokens=tokens),
            expected=round(self.expected - self.per_token * (self.part_tokens - tokens)),
        )

    def unrecorded(self) -> MemoryPlan | None:
        """Return the same without recordings; None where there are none.

        It takes less than ``expected``, how much was not measured.
        """
        if not self.recipe.capture:
            return None
        return replace(self, recipe=replace(self.recipe, capture=False))

    def __str__(self) -> str:
        recipe = self.recipe
        parts = [
            f"parts of {recipe.part_tokens:,} tokens",
            f"{'bfloat16' if recipe.offload else 'float32'} weights",
            *(["optimiser in host memory"] if recipe.offload else []),
            *(["head in host memory"] if recipe.host_head else []),
            *(["blocks computed again for their gradient"] if recipe.recompute else []),
            *(["recorded"] if recipe.capture else []),
        ]
        return f"{size(self.expected)} expected of {size(self.budget)}: {', '.join(parts)}"


def candidates(
    device: torch.device,
    budget: int,
    hidden: int,
    head_width: int,
    *,
    loss: str,
    recorded: bool = True,
) -> list[Recipe]:
    """Return recipes in the order in which they are to be tried: the fastest first.

    Host memory is a place of its own beside a GPU alone. ``recorded``: whether steps of those that
    are trained can be recorded at all. An exact loss streams a head that lies in host memory, which
    never is.
    """
    logits = max(budget // LOGIT_SHARE, LEAST_LOGITS, LOGITS_OF_HIDDEN * hidden)
    plain = replace(plain_recipe(device, head_width), logit_bytes=logits, emitted=EMITTED, ahead=1)
    found = [plain]
    if device.type == "cuda":
        places = (False, True) if has_triton() else (False,)  # a kernel steps states on the host
        found = [
            replace(plain, offload=offload, host_head=host)
            for offload in places
            for host in (False, True)
        ]
    found = [
        replace(
            recipe,
            recompute=recompute,
            capture=recipe.capture and recorded and not (recipe.host_head and loss == "exact"),
        )
        for recipe in found
        for recompute in (False, True)
    ]
    if found[-1].capture:  # a recording has copies of what goes in
        found.append(replace(found[-1], capture=False))
    return found


def choose(
    recipes: Sequence[Recipe],
    budget: int,
    footprint: Callable[[Recipe, int | None], Footprint | None],
    *,
    longest: int,
    step_tokens: int,
    loss: str,
) -> MemoryPlan:
    """Return the first recipe that holds good parts, or else less good ones, within a budget.

    Args:
        recipes: to choose from, the best first.
        budget: bytes.
        footprint: measures a recipe within so many bytes; None where it took more than that.
        longest: tokens of the longest sequence, which is never cut.
        step_tokens: tokens of a step: larger parts are of no use.
        loss: of those that are trained.

    Raises ``DeviceMemoryError``, with the least that would do, if none holds a sequence.
    """
    found: dict[int, Footprint | None] = {}
    room = budget * USED
    step_tokens = max(step_tokens, longest)
    wanted = [(kind, least) for kind, good in GOOD_TOKENS.items() for least in good]
    for kind, least in [*wanted, ("plain", 0)]:
        least = max(longest, min(least, step_tokens))
        for number, recipe in enumerate(recipes):
            if _kind(recipe, loss) != kind:
                continue
            if number not in found:
                found[number] = footprint(recipe, budget)
            measured = found[number]
            if measured is None:
                continue
            tokens = min(measured.tokens(room), step_tokens)
            if tokens < step_tokens:
                tokens = max(tokens // STEP_TOKENS * STEP_TOKENS, min(tokens, longest))
            if tokens >= least:
                recipe = replace(recipe, part_tokens=tokens)
                return MemoryPlan(
                    recipe=recipe,
                    budget=budget,
                    expected=measured.at(tokens),
                    per_token=measured.per_token,
                )
    known = [measured.at(longest) / USED for measured in found.values() if measured is not None]
    if not known and (measured := footprint(recipes[-1], None)):
        # Within the budget it did not hold, whatever it takes where there is room.
        known = [max(measured.at(longest) / USED, budget * MORE)]
    raise too_small(budget, longest, min(known, default=None))


def _kind(recipe: Recipe, loss: str) -> str:
    if recipe.capture:
        return "recorded"
    return "streamed" if recipe.host_head and loss == "exact" else "plain"


def too_small(budget: int, longest: int, least: float | None) -> DeviceMemoryError:
    """Return the error of a budget that holds no sequence; ``least`` bytes would, if known."""
    takes, way_out = "more", "Give more"
    if least is not None:
        takes, way_out = f"{size(least)} at least", f"Type: --memory {rounded(least)}"
    return DeviceMemoryError(
        f"a budget of {size(budget)} does not hold a sequence of {longest:,} tokens with what "
        f"trains on it: that takes {takes}. {way_out}"
    )


def rounded(count: float) -> str:
    """Return bytes as `bytes_of` reads them, rounded up.

    >>> rounded(1_230_000_000), rounded(2_040_000)
    ('1.3GB', '2.1MB')
    """
    unit, name = (1e9, "GB") if count > 5e8 else (1e6, "MB")
    return f"{-(-count // (unit / 10)) / 10:g}{name}"
