"""The ladder of a memory budget: named step settings in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from embedcache.device import has_triton
from embedcache.errors import DeviceMemoryError
from embedcache.training.step.settings import StepSettings, plain_settings
from embedcache.units import format_bytes

PART_TOKENS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512)
"""Sizes of the parts of a step that are tried with all settings. Still smaller parts take more time
per token, so they are tried with the leanest settings only."""
FEWEST_TOKENS = (384, 256, 192, 128, 64)
"""Sizes that are tried last, with the leanest settings only."""
DELTA_POSITIONS = 512
"""Positions whose x′ exists at a time; more would hardly be faster."""
LOGIT_SHARE = 16
"""Logits take at most the budget divided by this."""
LEAST_LOGITS, LOGITS_OF_HIDDEN = 1 << 20, 1024
"""Least bytes of logits, in total and per component of an embedding; the larger limit applies. With
fewer, the tiles of a streamed head are too small for an efficient product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Step settings that were measured to fit in a budget.

    Attributes:
        name: the settings in words.
        settings: how steps are computed.
        rung: number of the plan in the ladder, by which several processes compare their plans.
        budget: bytes of device memory.
        expected: bytes in use at the peak of the probe.
    """

    name: str
    settings: StepSettings
    rung: int
    budget: int
    expected: int

    def __str__(self) -> str:
        parts = f"parts of {self.settings.part_tokens:,} tokens"
        graphs = ", CUDA graphs" if self.settings.cuda_graph else ""
        use = f"{format_bytes(self.expected)} expected of {format_bytes(self.budget)}"
        return f"{use}: {self.name}, {parts}{graphs}"


@dataclass(frozen=True, slots=True)
class Rung:
    """Named step settings, and the sizes of parts to try with them, the largest first."""

    name: str
    settings: StepSettings
    sizes: Sequence[int]


def ladder(
    device: torch.device,
    *,
    budget: int,
    hidden: int,
    head_width: int,
    loss: str,
    longest: int,
    step_tokens: int,
    graphs: bool,
) -> list[Rung]:
    """Return the step settings for a budget, the fastest first.

    Args:
        device: the training device. Only with a GPU can parts of a step move to host memory.
        budget: bytes of device memory.
        hidden: width of the base's embeddings.
        head_width: width of an attention head of the carry-on.
        loss: ``"exact"`` or ``"shortlist"``. The exact loss streams a head in host memory, which is
            slow, so the optimiser moves to host memory before the head.
        longest: tokens of the longest sequence; sequences are never cut.
        step_tokens: tokens of a step. No part is larger, unless it is one longer sequence.
        graphs: whether the steps of these carry-ons can be captured as CUDA graphs.
    """
    logits = max(budget // LOGIT_SHARE, LEAST_LOGITS, LOGITS_OF_HIDDEN * hidden)
    plain = replace(
        plain_settings(device, head_width),
        logit_bytes=logits,
        delta_positions=DELTA_POSITIONS,
        ahead=1,
    )
    step_tokens = max(step_tokens, longest)

    def sizes(wanted: Sequence[int]) -> list[int]:
        return list(dict.fromkeys(max(longest, min(tokens, step_tokens)) for tokens in wanted))

    rungs = []
    for name, changes in _named(device, loss).items():
        captured = (
            plain.cuda_graph and graphs and not (changes.get("host_head") and loss == "exact")
        )
        settings = replace(plain, cuda_graph=captured, **changes)
        rungs.append(Rung(name, settings, sizes(PART_TOKENS)))
    rungs[-1] = replace(rungs[-1], sizes=sizes((*PART_TOKENS, *FEWEST_TOKENS, longest)))
    if settings.cuda_graph:  # a graph holds copies of its inputs
        rungs.append(Rung(name, replace(settings, cuda_graph=False), [longest]))
    return rungs


def _named(device: torch.device, loss: str) -> dict[str, dict[str, Any]]:
    """Return the changes to the plain settings, by name, the fastest first."""
    again = {"recompute": True}
    if device.type != "cuda":
        return {"activations kept": {}, "activations recomputed": again}
    head, optimiser = {"host_head": True}, {"offload": True}
    if not has_triton():  # the optimiser step in host memory is a Triton kernel
        both, places = head, "head"
        one: dict[str, dict[str, Any]] = {}
    else:
        both, places = head | optimiser, "head and optimiser"
        one = {
            "shortlist": {"head in host memory": head},
            "exact": {"optimiser in host memory": optimiser},
        }[loss]
    return {
        "all on the GPU": {},
        "activations recomputed": again,
        **one,
        f"{places} in host memory": both,
        f"{places} in host memory, activations recomputed": both | again,
    }


def too_small(budget: int, longest: int, least: float | None) -> DeviceMemoryError:
    """Return the error for a budget too small for a sequence; ``least`` bytes suffice, if known."""
    takes, way_out = "more", "Pass a larger `memory=`."
    if least is not None:
        text = rounded_size(least)
        takes, way_out = f"at least {text}", f'Pass `memory="{text}"`'
    return DeviceMemoryError(
        f"`memory=` of {format_bytes(budget)} is too small to train on a sequence of {longest:,} "
        f"tokens: expected {takes}. {way_out}"
    )


def rounded_size(count: float) -> str:
    """Return a number of bytes as text that `parse_bytes` reads, rounded up.

    >>> rounded_size(1_230_000_000), rounded_size(2_040_000)
    ('1.3GB', '2.1MB')
    """
    unit, name = (1e9, "GB") if count > 5e8 else (1e6, "MB")
    return f"{-(-count // (unit / 10)) / 10:g}{name}"
