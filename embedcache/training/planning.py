"""Measuring what training a stack takes, for its memory budget."""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice

import torch

from embedcache.cache.batch import Batch
from embedcache.carryon.model import CarryOn
from embedcache.training.config import TrainConfig
from embedcache.training.materials import Materials
from embedcache.training.memory import Footprint, MemoryPlan, candidates, choose, held, peak_of
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

    The gradients of parts of two sizes are taken, and nothing is kept of them.

    Raises ``DeviceMemoryError`` if no recipe holds a sequence.
    """
    longest = materials.cache.attributes.settings.context

    def footprint(recipe: Recipe, most: int | None) -> Footprint | None:
        with held(most, materials.device):
            return measure(recipe)

    def measure(recipe: Recipe) -> Footprint | None:
        measured: dict[int, int] = {}
        least = max(longest, TRIED)
        for tokens in (least, 2 * least):
            try:
                given, taken = _trial(materials, configs, loss, replace(recipe, part_tokens=tokens))
            except torch.OutOfMemoryError:
                break
            measured[given] = taken
        gc.collect()  # an error of the loader's thread holds what was tried
        if len(measured) == 2:
            return Footprint.through(measured)
        # One size alone: all of it may grow with the part.
        return next((Footprint(0, taken / given) for given, taken in measured.items()), None)

    return choose(
        candidates(materials.device, budget, materials.hidden),
        budget,
        footprint,
        longest=longest,
        step_tokens=max(materials.batch_tokens(config) for config in configs),
    )


def _trial(
    materials: Materials, configs: Sequence[TrainConfig], loss: str, recipe: Recipe
) -> tuple[int, int]:
    """Take the gradients of some parts; return the tokens of the largest, and bytes at the peak.

    Tokens of one row count with its padding. Carry-ons of another order see parts of their own.
    """
    config, device = configs[0], materials.device
    inputs = materials.inputs(config.carryon, recipe, training=True)
    scoring = materials.inputs(config.carryon, recipe)
    with torch.random.fork_rng(devices=[]):
        models = [CarryOn(config.carryon, materials.hidden) for config in configs]
    orders = {materials.order(config): config for config in configs}
    resident = {id(t): t for one in (inputs, scoring) for t in one.tensors() if t.device == device}
    given = 0
    with peak_of(device, resident.values()) as peak, ExitStack() as loaders:
        stack = Stack(models, configs, inputs, recipe)
        feeds = {
            order: loaders.enter_context(closing(_parts(materials, config, loss, recipe)))
            for order, config in orders.items()
        }
        for batches in islice(zip(*feeds.values(), strict=False), PARTS):
            by_order = dict(zip(feeds, batches, strict=True))
            work = [
                Work(batch=batch, targets=batch.whole.targets, rate=0.0)
                for batch in (by_order[materials.order(config)] for config in configs)
            ]
            work.sort(key=lambda one: id(one.batch))
            stack.differentiate(work)
            given = max(given, *map(_size, batches))
            del batches, by_order, work
        del stack
    return given, peak[0]


def _size(batch: Batch) -> int:
    return batch.tokens if batch.starts_M is None else batch.ids_BT.numel()


def _parts(
    materials: Materials, config: TrainConfig, loss: str, recipe: Recipe
) -> Generator[Batch]:
    shortlist = materials.shortlist(config, recipe) if loss == "shortlist" else None

    def draw(batch: Batch) -> Sequence[Sequence[object]]:
        return () if shortlist is None else shortlist.draw(batch.targets_N, shortlist.generator(0))

    return materials.train_loader(config, recipe).epoch(0, draw=draw)
