"""Trains carry-ons on one cache. Carry-ons of one shape are stacked; each learns as if alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby

import torch

from embedcache.cache.cache import Cache
from embedcache.carryon.protocol import CarryOn
from embedcache.carryon.registry import build
from embedcache.data.loader import kept_bytes_per_loader
from embedcache.device import device_context, free_memory
from embedcache.errors import DeviceMemoryError
from embedcache.progress import Progress
from embedcache.training.budget.allocator import memory_limit
from embedcache.training.budget.ladder import MemoryPlan
from embedcache.training.budget.probe import plan_memory
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.inputs import Patterns, TrainingInputs
from embedcache.training.loop import Loop, failing
from embedcache.training.run.run import Run
from embedcache.training.scoring import DevLoss, dev_losses
from embedcache.training.step.batch_stream import BatchStream
from embedcache.training.step.settings import PLAIN, StepSettings, plain_settings
from embedcache.training.step.stack import Stack

CPU_STACK_BYTES = 400 << 20
"""Most bytes that a stack uses on a CPU, so that they stay in the CPU's caches."""

FREE = 0.9
"""When a run without a budget runs out of memory, its budget becomes this share of free memory."""

Begun = tuple[Run, CarryOn]


class Trainer:
    """Trains runs on one cache, within ``memory`` bytes of the device if that is set."""

    def __init__(
        self,
        cache: Cache,
        device: torch.device,
        progress: Progress,
        ranks: Ranks = ALONE,
        memory: int | None = None,
    ):
        self.inputs = TrainingInputs(cache, device, ranks)
        self._cache, self._device, self._progress, self._ranks = cache, device, progress, ranks
        self._memory = memory
        self._base_dev: dict[Patterns, float | None] = {}
        self._said = ""

    def stacks(self, runs: Sequence[Run]) -> Iterator[list[Run]]:
        """Yield lists of runs to stack: runs of one shape and loss, as many as memory allows."""

        def kind(run: Run) -> str:
            config = run.config
            return repr((config.carryon, run.loss, config.samples))

        for _, group in groupby(sorted(runs, key=kind), key=kind):
            stack = list(group)
            size = self._most(stack)
            for start in range(0, len(stack), size):
                yield stack[start : start + size]

    def _most(self, runs: Sequence[Run]) -> int:
        """Return how many runs of one shape to stack, by a rough estimate of the memory of each.

        The runs may take half of the budget or of the free memory; on a CPU, at most
        `CPU_STACK_BYTES`.
        """
        config, hidden = runs[0].config.carryon, self.inputs.hidden
        tokens = max(self.inputs.batch_tokens(run.config) for run in runs)
        values = config.values_per_token(hidden)
        size = 2 if self._device.type == "cuda" else 4
        weights = 24 * build(config, hidden).parameter_count()
        room = (self._memory or free_memory(self._device)) // 2
        if self._device.type == "cpu":
            room = min(room, CPU_STACK_BYTES)
        return max(1, room // (tokens * values * size + weights))

    def run(self, runs: Sequence[Run], plan: MemoryPlan | None = None) -> None:
        """Train runs of one shape and one loss until each is finished or has failed.

        When the device runs out of memory, everything on the device is freed, and training resumes
        from the last saved state with a leaner plan.
        """
        todo: list[tuple[Sequence[Run], MemoryPlan | None]] = [(runs, plan)]
        while todo:
            runs, plan = todo.pop(0)
            try:
                self._attempt(runs, plan)
                continue
            except torch.OutOfMemoryError:
                if self._ranks.count > 1:  # the others wait for this one's gradients
                    raise
            gc.collect()  # the error held the step's tensors
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            left = [one for one in runs if one.failure is None and one.summary is None]
            todo[:0] = self._leaner(left, plan)

    def _leaner(
        self, runs: list[Run], plan: MemoryPlan | None
    ) -> list[tuple[list[Run], MemoryPlan | None]]:
        """Return what to retry after memory ran out: a leaner plan, or smaller stacks.

        A run for which neither is left fails with a ``DeviceMemoryError``.
        """
        found: MemoryPlan | None = None
        parts: list[tuple[list[Run], MemoryPlan | None]]
        budget = self._memory or (
            int(FREE * free_memory(self._device)) if plan is None else plan.budget
        )
        configs = [run.config for run in runs]
        with suppress(DeviceMemoryError):
            found = plan_memory(self.inputs, configs, runs[0].loss, budget, below=plan)
        if found is not None:
            parts = [(runs, found)]
        elif len(runs) > 1:
            half = len(runs) // 2
            parts = [(runs[:half], plan), (runs[half:], plan)]
        elif plan is not None and runs[0].advanced:
            parts = [(runs, plan)]  # retry: the run has completed steps with this plan
        else:
            (run,) = runs
            run.failure = DeviceMemoryError(
                f"{self._device} ran out of memory at step {run.state.step}, and no smaller plan "
                "fits. Train a smaller carry-on (fewer or narrower layers, fewer taps), or pass a "
                f"larger `memory=`. The last checkpoint is kept in {run.out}: run the same call "
                "again to resume."
            )
            return []
        self._progress.say("Out of memory; retrying with a smaller plan.")
        return parts

    def _attempt(self, runs: Sequence[Run], plan: MemoryPlan | None) -> None:
        """Train runs with one plan; raises ``torch.OutOfMemoryError`` when memory runs out."""
        settings = plain_settings(self._device, runs[0].config.carryon.attention_head_width)
        if plan is not None:
            settings = plan.settings
            self._progress.say(f"memory: {plan}")
            for run in runs:
                run.memory = str(plan)
        input_stats = self.inputs.input_stats(runs[0].config.carryon.taps)
        begun: list[Begun] = []
        for run in runs:
            with failing(run):
                begun.append((run, run.begin(self.inputs.hidden, input_stats)))
        begun = sorted((one for one in begun if one[0].failure is None), key=self._place)
        if begun:
            budget = None if plan is None else plan.budget
            with device_context(self._device), memory_limit(budget, self._device):
                self._train(begun, settings)

    def _train(self, begun: Sequence[Begun], settings: StepSettings) -> None:
        with ExitStack() as reading:
            streams = []
            groups = [[run for run, _ in of] for _, of in groupby(begun, key=self._place)]
            room = kept_bytes_per_loader(len(groups) * self._ranks.count)
            for runs in groups:
                streams.append(self._stream(runs, settings, room))
                reading.callback(streams[-1].close)
            # The first batches are read while the base is scored.
            for run, _ in begun:
                with failing(run):
                    run.take_base(self._base(run, settings))
            self._step(begun, streams, settings)

    def _step(
        self, begun: Sequence[Begun], streams: list[BatchStream], settings: StepSettings
    ) -> None:
        runs, models = [run for run, _ in begun], [model for _, model in begun]
        carryon = runs[0].config.carryon
        stack = Stack(
            models,
            [run.config for run in runs],
            self.inputs.frozen(carryon, settings, training=True),
            settings,
            self._ranks,
        )
        for index, run in enumerate(runs):
            run.enter(stack, index)
        self._say_loss(runs, settings)

        def score(stream: BatchStream, stack: CarryOn) -> list[DevLoss] | None:
            return self.score(stream.runs[0], stack, settings, stream)

        with self._progress.bar("training", sum(m.total for m in runs), "tok") as bar:
            bar.advance(sum(run.state.tokens for run in runs))
            Loop(
                stack,
                streams,
                bar,
                ranks=self._ranks,
                device=self._device,
                score=score,
                finish=lambda run: run.finish(self._cache.attributes, self._cache.manifest),
            ).train()

    def _say_loss(self, runs: Sequence[Run], settings: StepSettings) -> None:
        """Say how the loss is computed, unless the same was said before."""
        config = runs[0].config
        likely = ", the base's top ids" if self.inputs.train.top_ids else ""
        draws = self.inputs.draws(config)
        text = (
            f"loss: softmax over a shortlist (the batch's labels{likely} and {draws:,} sampled "
            "tokens)"
        )
        if runs[0].loss == "exact":
            head = self.inputs.frozen(config.carryon, settings, training=True).head
            tokens = max(self.inputs.batch_tokens(run.config) for run in runs)
            positions = min(tokens, settings.part_tokens or tokens)
            if settings.delta_positions and not settings.host_head:
                positions = min(positions, settings.delta_positions)
            positions *= len(runs)
            chunks = settings.chunks(head, positions, self._device)
            text = f"loss: exact softmax, logits in chunks of {chunks}"
        if text != self._said:
            self._said = text
            self._progress.say(text)

    def _stream(self, runs: list[Run], settings: StepSettings, kept_bytes: int) -> BatchStream:
        """Return the batches of runs that are at the same place in the same order."""
        config = runs[0].config
        loader = self.inputs.train_loader(config, settings, kept_bytes=kept_bytes)
        if runs[0].loss != "shortlist":
            return BatchStream(loader, runs)
        return BatchStream(loader, runs, self.inputs.shortlist(config, settings))

    def score(
        self,
        run: Run,
        stack: CarryOn | None,
        settings: StepSettings = PLAIN,
        stream: BatchStream | None = None,
    ) -> list[DevLoss] | None:
        """Return the dev loss of each carry-on of a stack, or of the base without one.

        Args:
            run: the run whose dev documents are scored.
            stack: the carry-ons.
            settings: how a step is computed.
            stream: the stream whose shortlists estimate the loss as well.

        Returns None for a cache without a dev split.
        """
        config = run.config
        tokens = self.inputs.tokens("dev", config.documents)
        if not tokens:
            return None
        taps = ("final",) if stack is None else config.carryon.taps
        title = "scoring the base on dev" if stack is None else "scoring dev"
        with self._progress.bar(title, tokens, "tok") as bar:
            return dev_losses(
                self.inputs.dev_loader(config.documents, taps, settings).epoch(0),
                self.inputs.frozen(config.carryon, settings),
                stack,
                None if stream is None else stream.shortlist,
                bar.advance,
                self._ranks,
                settings,
            )

    def _base(self, run: Run, settings: StepSettings) -> float | None:
        """Return the base's dev loss on a run's documents, computed once."""
        patterns = run.config.documents
        if patterns not in self._base_dev:
            found = run.state.base_dev
            if found is None and (scores := self.score(run, None, settings)):
                found = scores[0].exact
            if found is None:
                which = f" that match {', '.join(patterns)}" if patterns else ""
                self._progress.say(f"no dev documents{which}: the last epoch is kept, not the best")
            self._base_dev[patterns] = found
        return self._base_dev[patterns]

    def _place(self, begun: Begun) -> tuple[object, ...]:
        """Return a run's order of batches and its position; runs with equal ones share batches."""
        config, state = begun[0].config, begun[0].state
        return (*self.inputs.order(config), state.epoch, state.position)

    def planned(self, runs: Sequence[Run]) -> list[tuple[list[Run], MemoryPlan | None]]:
        """Return lists of runs to stack, each with its plan for the memory budget.

        All processes of a run use the leanest of their plans. Raises ``DeviceMemoryError`` if no
        plan fits.
        """
        found: list[tuple[list[Run], MemoryPlan | None]] = []
        todo = list(self.stacks(runs))
        while todo:
            stack = todo.pop(0)
            plan = self._plan(stack)
            if isinstance(plan, DeviceMemoryError):
                if len(stack) == 1:
                    raise plan
                half = len(stack) // 2
                todo[:0] = [stack[:half], stack[half:]]
            else:
                found.append((stack, plan))
        return found

    def _plan(self, runs: Sequence[Run]) -> MemoryPlan | DeviceMemoryError | None:
        if self._memory is None:
            return None
        configs = [run.config for run in runs]
        plan: MemoryPlan | DeviceMemoryError
        try:
            plan = plan_memory(self.inputs, configs, runs[0].loss, self._memory)
        except DeviceMemoryError as error:
            plan = error
        plans = self._ranks.gather(plan)
        failed = [one for one in plans if isinstance(one, DeviceMemoryError)]
        made = [one for one in plans if isinstance(one, MemoryPlan)]
        return failed[0] if failed else max(made, key=lambda one: one.rung)
