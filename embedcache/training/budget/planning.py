"""Measuring what training a stack takes, for its memory budget."""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from embedcache.carryon.registry import build
from embedcache.data.batch import Batch
from embedcache.device import current, fast_dtype, wait_for
from embedcache.errors import DeviceMemoryError
from embedcache.training.budget.allocator import held, peak_of
from embedcache.training.budget.memory import (
    MORE,
    Footprint,
    MemoryPlan,
    candidates,
    choose,
    too_small,
)
from embedcache.training.config import TrainConfig
from embedcache.training.inputs import Materials
from embedcache.training.step.cuda_graph import MOST, Captured
from embedcache.training.step.settings import Recipe
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs

TRIED = 512
"""Tokens of the smaller of two parts that are tried: less are lost in what is rounded up."""
HELD = 0.97
"""Share of a budget within which a plan has to hold when it is tried: later parts take more."""
PARTS = 4
"""Parts that are tried: on a GPU, others are made ahead by then, as they are in training."""


def plan_memory(
    materials: Materials, configs: Sequence[TrainConfig], loss: str, budget: int
) -> MemoryPlan:
    """Return how to train carry-ons of one shape and loss within ``budget`` bytes of the device.

    The gradients of parts of two sizes are taken, and nothing is kept of them. On a GPU, whose
    allocator also leaves gaps, the plan is tried within the budget, and its parts made smaller
    until it holds; if it does not with parts of one sequence, the next recipe is.

    Raises ``DeviceMemoryError`` if no recipe holds a sequence.
    """
    longest = materials.cache.attributes.settings.context
    trials = _Trials(materials, configs, loss)
    shape = configs[0].carryon
    recipes = found = candidates(
        materials.device,
        budget,
        materials.hidden,
        shape.attention_head_width,
        loss=loss,
        recorded=len(configs) <= MOST and len(set(map(materials.order, configs))) == 1,
    )
    while recipes:
        plan: MemoryPlan | None
        try:
            plan = choose(
                recipes,
                budget,
                trials.footprint,
                longest=longest,
                step_tokens=max(materials.batch_tokens(config) for config in configs),
                loss=loss,
            )
        except DeviceMemoryError:
            if recipes is found:
                raise
            break  # of those that are left none was thought to hold
        assert plan is not None
        recipes = [one for one in recipes if one != replace(plan.recipe, part_tokens=None)]
        while plan is not None:
            if trials.holds(plan.recipe, budget):
                return plan
            plan = plan.smaller(longest)
    raise too_small(budget, longest, budget * MORE)


class _Trials:
    """Takes gradients by one recipe or another, and keeps nothing of them."""

    def __init__(self, materials: Materials, configs: Sequence[TrainConfig], loss: str):
        self._materials, self._configs, self._loss = materials, configs, loss
        self._longest = materials.cache.attributes.settings.context
        self._footprints: dict[tuple[Recipe, int | None], Footprint | None] = {}
        with torch.random.fork_rng(devices=[]):
            self._models = [build(config.carryon, materials.hidden) for config in configs]

    def footprint(self, recipe: Recipe, budget: int | None) -> Footprint | None:
        """Return what a recipe takes, as measured once; None where that is more than a budget."""
        key = recipe, budget
        if key not in self._footprints:
            hopeless = budget is not None and self._kept(recipe) > budget
            self._footprints[key] = None if hopeless else self._measured(recipe, budget)
        return self._footprints[key]

    def _kept(self, recipe: Recipe) -> int:
        """Return the bytes that a recipe keeps on the device whatever a part is."""
        weights = sum(model.parameter_count() for model in self._models)
        # Weights and gradients; and means and squares, unless they are on the host.
        kept = weights * (2 * 2 if recipe.offload else 4 * 4)
        if not recipe.host_head:
            base, dtype = self._materials.cache.attributes.base, fast_dtype(self._materials.device)
            kept += base["hidden_size"] * base["vocab_size"] * dtype.itemsize
        return kept

    def _measured(self, recipe: Recipe, budget: int | None) -> Footprint | None:
        measured: dict[int, int] = {}
        least = max(self._longest, TRIED)
        with held(budget, self._materials.device):
            for tokens in (least, 2 * least):
                try:
                    given, taken = self._try(replace(recipe, part_tokens=tokens))
                except torch.OutOfMemoryError:
                    break
                measured[given] = taken
            gc.collect()  # an error of the loader's thread holds what was tried
        if len(measured) == 2:
            return Footprint.through(measured)
        # One size alone: all of it may grow with the part.
        return next((Footprint(0, taken / given) for given, taken in measured.items()), None)

    def holds(self, recipe: Recipe, budget: int) -> bool:
        """Say whether the allocator can keep a recipe within a budget; of a CPU that it can."""
        if self._materials.device.type != "cuda":
            return True
        held_it = True
        try:
            with held(int(budget * HELD), self._materials.device):
                self._try(recipe, whole=True)
        except torch.OutOfMemoryError:
            held_it = False
        gc.collect()  # an error of the loader's thread holds what was tried
        return held_it

    def _try(self, recipe: Recipe, *, whole: bool = False) -> tuple[int, int]:
        """Take gradients of some parts; return the tokens of the largest, and bytes at the peak.

        Tokens of one row count with its padding. Carry-ons of another order see parts of their own.
        With ``whole``, twice as many parts, and the optimiser goes over its states, too.
        """
        materials, configs = self._materials, self._configs
        config, device = configs[0], materials.device
        inputs = materials.inputs(config.carryon, recipe, training=True)
        scoring = materials.inputs(config.carryon, recipe)
        orders = {materials.order(config): config for config in configs}
        used = [*inputs.tensors(), *scoring.tensors()]
        resident = {id(tensor): tensor for tensor in used if tensor.device == device}
        given = 0
        with current(device), peak_of(device, resident.values()) as peak, ExitStack() as loaders:
            stack = Stack(self._models, configs, inputs, recipe)
            captured = Captured(stack, device) if recipe.capture else None
            taker = captured or stack
            feeds = {
                order: loaders.enter_context(closing(self._parts(config, recipe)))
                for order, config in orders.items()
            }
            loaders.callback(wait_for, device)  # what is recorded goes when nothing of it runs
            for _ in range(2 * PARTS if whole else PARTS):
                due = {order: next(parts, None) for order, parts in feeds.items()}
                work = [
                    Work(inputs=part, targets=part.batch.total.targets, rate=0.0)
                    for part in (due[materials.order(config)] for config in configs)
                    if part is not None
                ]
                if len(work) < len(configs):
                    break
                work.sort(key=lambda one: id(one.inputs))
                given = max(given, *(_size(one.inputs.batch) for one in work))
                differentiate = taker.prepared(work)
                del due, work  # their memory is the next ones'
                loss_K = differentiate()
                if captured is not None and not captured.room:
                    raise torch.OutOfMemoryError
                if whole:
                    with stack.optimizer.held():
                        taker.finish(loss_K)
                del differentiate
        return given, peak[0]

    def _parts(self, config: TrainConfig, recipe: Recipe) -> Generator[StepInputs | None]:
        materials = self._materials
        shortlist = materials.shortlist(config, recipe) if self._loss == "shortlist" else None

        def prepare(batch: Batch) -> StepInputs:
            if shortlist is None:
                return StepInputs(batch)
            generator = shortlist.generator(0)
            return StepInputs(batch, shortlist.draw(batch.targets_N, generator, batch.top_ids_NJ))

        return materials.train_loader(config, recipe).epochs(range(1), prepare=prepare)


def _size(batch: Batch) -> int:
    return batch.tokens if batch.cu_seqlens_M is None else batch.ids_BT.numel()
