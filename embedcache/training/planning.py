"""Measuring what training a stack takes, for its memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

import torch

from embedcache.cache.batch import Batch
from embedcache.carryon.model import CarryOn
from embedcache.training.config import TrainConfig
from embedcache.training.materials import Materials
from embedcache.training.memory import Footprint, MemoryPlan, candidates, choose, hold, peak_of
from embedcache.training.recipe import Recipe
from embedcache.training.stack import Stack, Work

TRIED = 512
"""Tokens of the smaller of two parts that are tried: less are lost in what is rounded up."""
PARTS = 4
"""Parts that are tried: on a GPU, others are made ahead by then, as they are in training."""


def plan_memory(
    materials: Materials, configs: Sequence[TrainConfig], loss: str, budget: int
) -> MemoryPlan:
    """Return how to train carry-ons of one shape and loss within ``budget`` bytes of the device.

    The gradients of parts of two sizes are taken, and nothing is kept of them. On CUDA the
    allocator reserves no more than the budget from now on.

    Raises ``DeviceMemoryError`` if no recipe holds a sequence.
    """
    step_tokens = max(materials.batch_tokens(config) for config in configs)
    longest = min(step_tokens, materials.cache.attributes.settings.context)
    hold(budget, materials.device)

    def footprint(recipe: Recipe) -> Footprint:
        measured: dict[int, int] = {}
        least = max(longest, TRIED)
        for tokens in (least, 2 * least):
            try:
                positions, taken = _trial(
                    materials, configs, loss, replace(recipe, part_tokens=tokens)
                )
            except torch.OutOfMemoryError:
                break
            measured[positions] = taken
        if len(measured) == 2:
            return Footprint.through(measured)
        # One size alone: all of it may grow with the part.
        return Footprint(0, max((at / n for n, at in measured.items()), default=2.0 * budget))

    return choose(
        candidates(materials.device, budget, materials.hidden),
        budget,
        footprint,
        longest=longest,
        step_tokens=step_tokens,
    )


def _trial(
    materials: Materials, configs: Sequence[TrainConfig], loss: str, recipe: Recipe
) -> tuple[int, int]:
    """Take the gradient of a part; return its tokens, padded ones too in one row, and its bytes."""
    config, device = configs[0], materials.device
    inputs = materials.inputs(config.carryon, recipe, training=True)
    shortlist = materials.shortlist(config, recipe) if loss == "shortlist" else None
    with torch.random.fork_rng(devices=[]):
        models = [CarryOn(config.carryon, materials.hidden) for config in configs]

    def draw(batch: Batch) -> Sequence[Sequence[object]]:
        return () if shortlist is None else shortlist.draw(batch.targets_N, shortlist.generator(0))

    scoring = materials.inputs(config.carryon, recipe)
    heads = {id(one): one.head.weight_VH for one in (inputs, scoring)}
    resident = [head for head in heads.values() if head.device == device]
    given = 0
    with peak_of(device, resident) as peak:
        stack = Stack(models, configs, inputs, recipe)
        with closing(materials.train_loader(config, recipe).epoch(0, draw=draw)) as parts:
            for batch in islice(parts, PARTS):
                tokens, targets = batch.whole
                work = Work(batch=batch, tokens=tokens, targets=targets, rate=0.0)
                stack.differentiate([work] * len(configs))
                given = max(given, batch.tokens if batch.starts_M is None else batch.ids_BT.numel())
                del batch, work
        del stack
    return given, peak[0]
