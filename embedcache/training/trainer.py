"""Training carry-ons on one cache: those of one shape stacked, each as if it were alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch

from embedcache.cache.cache import Cache
from embedcache.carryon.protocol import CarryOn
from embedcache.carryon.registry import build
from embedcache.data.loader import kept_bytes_per_loader
from embedcache.device import current, free_memory
from embedcache.errors import DeviceMemoryError
from embedcache.progress import Progress
from embedcache.training.budget.allocator import held
from embedcache.training.budget.memory import MemoryPlan, rounded
from embedcache.training.budget.planning import plan_memory
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.inputs import Materials, Patterns
from embedcache.training.loop import Loop, failing
from embedcache.training.run.run import Member
from embedcache.training.scoring import DevLoss, dev_losses
from embedcache.training.step.batch_stream import Feed
from embedcache.training.step.settings import PLAIN, Recipe, plain_recipe
from embedcache.training.step.stack import Stack

CPU_STACK_BYTES = 400 << 20
"""Of what a stack works on, at most, on a CPU."""

Begun = tuple[Member, CarryOn]


class Trainer:
    """Trains members on one cache, within so many bytes of ``memory`` if that is set."""

    def __init__(
        self,
        cache: Cache,
        device: torch.device,
        progress: Progress,
        ranks: Ranks = ALONE,
        memory: int | None = None,
    ):
        self.materials = Materials(cache, device, ranks)
        self._cache, self._device, self._progress, self._ranks = cache, device, progress, ranks
        self._memory = memory
        self._base_dev: dict[Patterns, float | None] = {}
        self._told = ""

    def stacks(self, members: Sequence[Member]) -> Iterator[list[Member]]:
        """Yield the members in lists that one `run` can train: of one shape, and few enough."""

        def kind(member: Member) -> str:
            config = member.config
            return repr((config.carryon, member.loss, config.samples))

        for _, group in groupby(sorted(members, key=kind), key=kind):
            stack = list(group)
            size = self._most(stack)
            for start in range(0, len(stack), size):
                yield stack[start : start + size]

    def _most(self, members: Sequence[Member]) -> int:
        """Return how many of one shape to train at once, by a rough estimate of what each takes.

        On a GPU what half of its free memory holds; a CPU is slower where that leaves its caches.
        """
        config, hidden = members[0].config.carryon, self.materials.hidden
        tokens = max(self.materials.batch_tokens(member.config) for member in members)
        values = config.values_per_token(hidden)
        size = 2 if self._device.type == "cuda" else 4
        weights = 24 * build(config, hidden).parameter_count()
        room = (self._memory or free_memory(self._device)) // 2
        if self._device.type == "cpu":
            room = min(room, CPU_STACK_BYTES)
        return max(1, room // (tokens * values * size + weights))

    def run(self, members: Sequence[Member], plan: MemoryPlan | None = None) -> None:
        """Train members of one shape and one loss until each is finished or has failed."""
        recipe = plain_recipe(self._device, members[0].config.carryon.attention_head_width)
        if plan is not None:
            recipe = plan.recipe
            self._progress.say(f"memory: {plan}")
            for member in members:
                member.memory = str(plan)
        input_stats = self.materials.input_stats(members[0].config.carryon.taps)
        begun: list[Begun] = []
        for member in members:
            with failing(member):
                begun.append((member, member.begin(self.materials.hidden, input_stats)))
        begun = sorted((one for one in begun if one[0].failure is None), key=self._place)
        if not begun:
            return
        try:
            with current(self._device), held(None if plan is None else plan.budget, self._device):
                self._train(begun, recipe)
        except torch.OutOfMemoryError as error:
            if self._ranks.count > 1:  # the others wait for this one's gradients
                raise
            why = str(error).partition(" GPU ")[0].rstrip(".")
        else:
            return
        gc.collect()  # what the steps held
        members = [member for member, _ in begun]
        longest = self._cache.attributes.settings.context
        less = plan and (plan.smaller(longest) or plan.unrecorded())
        if less is not None and all(m.state.step == m.resumed_at for m in members):
            self._progress.say(f"that does not hold ({why}): once more, with less")
            self.run(members, less)
        else:
            self._fail_for_memory(members, why)

    def _train(self, begun: Sequence[Begun], recipe: Recipe) -> None:
        with ExitStack() as reading:
            feeds = []
            groups = [[member for member, _ in of] for _, of in groupby(begun, key=self._place)]
            room = kept_bytes_per_loader(len(groups) * self._ranks.count)
            for members in groups:
                feeds.append(self._feed(members, recipe, room))
                reading.callback(feeds[-1].close)
            # The first batches are read meanwhile.
            for member, _ in begun:
                with failing(member):
                    member.take_base(self._base(member, recipe))
            self._step(begun, feeds, recipe)

    def _step(self, begun: Sequence[Begun], feeds: list[Feed], recipe: Recipe) -> None:
        members, models = [member for member, _ in begun], [model for _, model in begun]
        carryon = members[0].config.carryon
        stack = Stack(
            models,
            [member.config for member in members],
            self.materials.inputs(carryon, recipe, training=True),
            recipe,
            self._ranks,
        )
        for index, member in enumerate(members):
            member.enter(stack, index)
        self._say_loss(members, recipe)

        def score(feed: Feed, stack: CarryOn) -> list[DevLoss] | None:
            return self.score(feed.members[0], stack, recipe, feed)

        with self._progress.bar("training", sum(m.total for m in members), "tok") as bar:
            bar.advance(sum(member.state.tokens for member in members))
            Loop(
                stack,
                feeds,
                bar,
                ranks=self._ranks,
                device=self._device,
                score=score,
                finish=lambda member: member.finish(self._cache.attributes, self._cache.manifest),
            ).train()

    def _say_loss(self, members: Sequence[Member], recipe: Recipe) -> None:
        """Say how the loss is computed, unless that was said of a stack before."""
        config = members[0].config
        likely = ", the base's top ids" if self.materials.train.top_ids else ""
        draws = self.materials.draws(config)
        told = f"loss: shortlists of the labels{likely} and {draws:,} draws"
        if members[0].loss == "exact":
            head = self.materials.inputs(config.carryon, recipe, training=True).head
            tokens = max(self.materials.batch_tokens(member.config) for member in members)
            positions = min(tokens, recipe.part_tokens or tokens)
            if recipe.emitted and not recipe.host_head:
                positions = min(positions, recipe.emitted)
            positions *= len(members)
            chunks = recipe.chunks(head, positions, self._device)
            told = f"loss: exact, logits of {chunks} at a time"
        if told != self._told:
            self._told = told
            self._progress.say(told)

    def _fail_for_memory(self, members: Sequence[Member], why: str) -> None:
        """End all that are not done, with what would have fitted."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        budget = int(0.8 * (self._memory or free_memory(self._device)))
        try:
            plan = plan_memory(self.materials, [m.config for m in members], members[0].loss, budget)
            way_out = f"Type the same with --memory {rounded(budget)} ({plan})"
        except (DeviceMemoryError, torch.OutOfMemoryError):
            way_out = "Train fewer or smaller ones: less --width, --blocks or taps"
        for member in members:
            if member.failure is None and member.summary is None:
                member.failure = DeviceMemoryError(
                    f"{self._device} ran out of memory at step {member.state.step} ({why}). "
                    f"{way_out}. What was saved last in {member.out} stands, and is gone on from"
                )

    def _feed(self, members: list[Member], recipe: Recipe, kept_bytes: int) -> Feed:
        """Return the batches of members that are at one place in one order."""
        config = members[0].config
        loader = self.materials.train_loader(config, recipe, kept_bytes=kept_bytes)
        if members[0].loss != "shortlist":
            return Feed(loader, members)
        return Feed(loader, members, self.materials.shortlist(config, recipe))

    def score(
        self,
        member: Member,
        stack: CarryOn | None,
        recipe: Recipe = PLAIN,
        feed: Feed | None = None,
    ) -> list[DevLoss] | None:
        """Return the dev loss of each carry-on of a stack, or of the base alone.

        On the documents of a member, and by the shortlists of a feed, too; None without dev.
        """
        config = member.config
        tokens = self.materials.tokens("dev", config.documents)
        if not tokens:
            return None
        taps = ("final",) if stack is None else config.carryon.taps
        title = "scoring the base on dev" if stack is None else "scoring dev"
        with self._progress.bar(title, tokens, "tok") as bar:
            return dev_losses(
                self.materials.dev_loader(config.documents, taps, recipe).epoch(0),
                self.materials.inputs(config.carryon, recipe),
                stack,
                None if feed is None else feed.shortlist,
                bar.advance,
                self._ranks,
                recipe,
            )

    def _base(self, member: Member, recipe: Recipe) -> float | None:
        """Return the base's dev loss on a member's documents; it is computed once."""
        patterns = member.config.documents
        if patterns not in self._base_dev:
            found = member.state.base_dev
            if found is None and (scores := self.score(member, None, recipe)):
                found = scores[0].exact
            if found is None:
                which = f" of {', '.join(patterns)}" if patterns else ""
                self._progress.say(f"this cache has no dev split{which}: the last epoch is kept")
            self._base_dev[patterns] = found
        return self._base_dev[patterns]

    def _place(self, begun: Begun) -> tuple[object, ...]:
        """Return where a member is in which order of batches: those at one place go in step."""
        config, state = begun[0].config, begun[0].state
        return (*self.materials.order(config), state.epoch, state.position)

    def planned(self, members: Sequence[Member]) -> list[tuple[list[Member], MemoryPlan | None]]:
        """Return the members in lists that one `run` can train, and how within the budget.

        All processes of a run keep to the leanest plan of theirs. Raises ``DeviceMemoryError`` if
        nothing fits.
        """
        found: list[tuple[list[Member], MemoryPlan | None]] = []
        todo = list(self.stacks(members))
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

    def _plan(self, members: Sequence[Member]) -> MemoryPlan | DeviceMemoryError | None:
        if self._memory is None:
            return None
        configs = [member.config for member in members]
        plan: MemoryPlan | DeviceMemoryError
        try:
            plan = plan_memory(self.materials, configs, members[0].loss, self._memory)
        except DeviceMemoryError as error:
            plan = error
        plans = self._ranks.gather(plan)
        failed = [one for one in plans if isinstance(one, DeviceMemoryError)]
        made = [one for one in plans if isinstance(one, MemoryPlan)]
        return failed[0] if failed else max(made, key=lambda one: one.leanness)
