"""Chooses step settings for a memory budget by measuring the memory of parts of a step."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice, product

import torch

from embedcache.carryon.registry import build
from embedcache.data.batch import Batch
from embedcache.device import device_context, fast_dtype, synchronize
from embedcache.training.budget.allocator import memory_limit, peak_memory
from embedcache.training.budget.ladder import MemoryPlan, Rung, ladder, too_small
from embedcache.training.config import TrainConfig
from embedcache.training.inputs import TrainingInputs
from embedcache.training.scoring import dev_losses
from embedcache.training.step.cuda_graph import MOST, GraphedStack
from embedcache.training.step.settings import StepSettings
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs

USED = 0.95
"""Share of a budget that a probe may use: later parts may take more."""
LEANER = 0.9
"""Factor on `USED` after a plan that had passed its probe ran out of memory."""
PARTS = {"cpu": 2, "cuda": 4}
"""Parts of a probe. On a GPU there are more, so that others are prepared ahead as in training."""


def plan_memory(
    inputs: TrainingInputs,
    configs: Sequence[TrainConfig],
    loss: str,
    budget: int,
    *,
    below: MemoryPlan | None = None,
) -> MemoryPlan:
    """Return the fastest step settings that fit in a budget.

    Args:
        inputs: the training inputs.
        configs: configurations of carry-ons of one shape, trained together.
        loss: ``"exact"`` or ``"shortlist"``.
        budget: bytes of device memory.
        below: a plan that ran out of memory; only leaner ones are tried.

    Raises:
        DeviceMemoryError: if no settings fit a sequence. The message gives the least budget that
            fits.
    """
    probe = _Probe(inputs, configs, loss)
    shares = [USED]
    plans = list(_plans(probe.ladder(budget), budget))
    names = list(dict.fromkeys(plan.name for plan in plans))
    if below is not None:
        plans = [plan for plan in plans if _leanness(plan, names) > _leanness(below, names)]
        shares.insert(0, LEANER * USED)
    for share, name in product(shares, names):
        tried = [plan for plan in plans if plan.name == name]
        if found := _first_that_holds(tried, probe, int(share * budget)):
            return found
    raise too_small(budget, probe.longest, probe.least(budget) if below is None else None)


def _plans(rungs: Sequence[Rung], budget: int) -> Iterator[MemoryPlan]:
    """Yield a plan for each rung and size of parts, in order; nothing is measured."""
    number = 0
    for rung in rungs:
        for tokens in rung.sizes:
            settings = replace(rung.settings, part_tokens=tokens)
            yield MemoryPlan(
                name=rung.name, settings=settings, rung=number, budget=budget, expected=0
            )
            number += 1


def _leanness(plan: MemoryPlan, names: Sequence[str]) -> tuple[int, int, bool]:
    """Return a key that orders the plans of a ladder, the leanest last."""
    settings = plan.settings
    assert settings.part_tokens is not None
    return names.index(plan.name), -settings.part_tokens, not settings.cuda_graph


def _first_that_holds(plans: Sequence[MemoryPlan], probe: _Probe, limit: int) -> MemoryPlan | None:
    """Return the first plan that fits, by bisection: each takes less memory than the last."""
    found: MemoryPlan | None = None
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        taken = probe.taken(plans[middle].settings, limit)
        if taken is None:
            low = middle + 1
        else:
            high, found = middle, replace(plans[middle], expected=taken)
    return found


class _Probe:
    """Measures the memory of the first parts of a step with given settings."""

    def __init__(self, inputs: TrainingInputs, configs: Sequence[TrainConfig], loss: str):
        self._inputs, self._configs, self._loss = inputs, configs, loss
        self.longest: int = inputs.cache.attributes.settings.context
        with torch.random.fork_rng(devices=[]):
            self._models = [build(config.carryon, inputs.hidden) for config in configs]

    def ladder(self, budget: int) -> list[Rung]:
        """Return the ladder of a budget for these carry-ons."""
        inputs, configs = self._inputs, self._configs
        return ladder(
            inputs.device,
            budget=budget,
            hidden=inputs.hidden,
            head_width=configs[0].carryon.attention_head_width,
            loss=self._loss,
            longest=self.longest,
            step_tokens=max(inputs.batch_tokens(config) for config in configs),
            graphs=len(configs) <= MOST and len(set(map(inputs.order, configs))) == 1,
        )

    def least(self, budget: int) -> float | None:
        """Return the least budget in bytes that fits a sequence, above one that does not."""
        *_, leanest = _plans(self.ladder(budget), budget)
        taken = self.taken(leanest.settings, None)
        if taken is None:
            return None
        least = max(taken / USED, budget * 1.05)
        for _ in range(10):  # a CUDA allocator reserves more than it gives out
            *_, leanest = _plans(self.ladder(int(least)), int(least))
            if self.taken(leanest.settings, int(USED * least)) is not None:
                break
            least *= 1.1
        return least

    def taken(self, settings: StepSettings, limit: int | None) -> int | None:
        """Return the bytes in use at the peak of a step's first parts; None if above the limit."""
        if limit is not None and self._kept(settings) > limit:
            return None
        try:
            with memory_limit(limit, self._inputs.device):
                taken = self._measured(settings)
        except torch.OutOfMemoryError:
            taken = None
        gc.collect()  # an error of the loader's thread keeps tensors alive
        return taken if limit is None or taken is None or taken <= limit else None

    def _kept(self, settings: StepSettings) -> int:
        """Return the bytes that settings keep on the device for parts of any size."""
        weights = sum(model.parameter_count() for model in self._models)
        # Weights and gradients; and both moments, unless they are in host memory.
        kept = weights * (2 * 2 if settings.offload else 4 * 4)
        if not settings.host_head:
            base, dtype = self._inputs.cache.attributes.base, fast_dtype(self._inputs.device)
            kept += base["hidden_size"] * base["vocab_size"] * dtype.itemsize
        return kept

    def _measured(self, settings: StepSettings) -> int:
        """Take some parts' gradients, a step of the optimiser, and a part's dev loss."""
        inputs, configs = self._inputs, self._configs
        config, device = configs[0], inputs.device
        frozen = inputs.frozen(config.carryon, settings, training=True)
        scoring = inputs.frozen(config.carryon, settings)
        used = [*frozen.tensors(), *scoring.tensors()]
        resident = {id(tensor): tensor for tensor in used if tensor.device == device}
        orders = {inputs.order(config): config for config in configs}
        with (
            device_context(device),
            peak_memory(device, resident.values()) as peak,
            ExitStack() as opened,
        ):
            stack = Stack(self._models, configs, frozen, settings)
            captured = GraphedStack(stack, device) if settings.cuda_graph else None
            taker = captured or stack
            streams = {
                order: opened.enter_context(closing(self._parts(config, settings)))
                for order, config in orders.items()
            }
            opened.callback(synchronize, device)  # graphs are freed when none of them runs
            for _ in range(PARTS[device.type]):
                due = {order: next(parts, None) for order, parts in streams.items()}
                work = [
                    Work(inputs=part, targets=part.batch.total.targets, rate=0.0)
                    for part in (due[inputs.order(config)] for config in configs)
                    if part is not None
                ]
                if len(work) < len(configs):
                    break
                work.sort(key=lambda one: id(one.inputs))
                differentiate = taker.prepared(work)
                del due, work  # the next ones need their memory
                loss_K = differentiate()
                if captured is not None and not captured.room:
                    raise torch.OutOfMemoryError
                with stack.optimizer.held():
                    taker.finish(loss_K)
                del differentiate
            captured, taker = None, stack  # as in training, no graph is kept while dev is scored
            with closing(inputs.train_loader(config, settings).epoch(0)) as batches:
                dev_losses(islice(batches, 1), scoring, stack.model, settings=settings)
        return peak[0]

    def _parts(self, config: TrainConfig, settings: StepSettings) -> Generator[StepInputs | None]:
        """Return the parts of an epoch's steps, with shortlists where the loss takes them."""
        shortlist = self._inputs.shortlist(config, settings) if self._loss == "shortlist" else None

        def prepare(batch: Batch) -> StepInputs:
            if shortlist is None:
                return StepInputs(batch)
            generator = shortlist.generator(0)
            return StepInputs(batch, shortlist.draw(batch.targets_N, generator, batch.top_ids_NJ))

        return self._inputs.train_loader(config, settings).epochs(range(1), prepare=prepare)
