"""The loop of training: step by step, epoch by epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from embedcache.carryon.protocol import CarryOn, stack_of
from embedcache.data.batch import Counts
from embedcache.errors import EmbedcacheError
from embedcache.progress import Bar
from embedcache.store.files import translate_write_errors
from embedcache.training.distributed import Ranks
from embedcache.training.run.run import Member
from embedcache.training.scoring import DevLoss
from embedcache.training.step.batch_stream import Feed
from embedcache.training.step.cuda_graph import Captured, recordable
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs
from embedcache.training.step.timestamps import Mark


class Arriving:
    """Losses and norms of a step, each [K], on their way to the host."""

    def __init__(self, loss_K: Tensor, norm_K: Tensor):
        # Into pinned memory, where they come from a GPU.
        self._values_2K = torch.stack([loss_K, norm_K]).to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if loss_K.is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(loss_K.device))

    def lists(self) -> list[list[float]]:
        """Return both, once they are there."""
        if self._there is not None:
            self._there.synchronize()
        values: list[list[float]] = self._values_2K.tolist()
        return values


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was begun: whose, how much each saw, what came of it, and waits for batches."""

    members: list[Member]
    counts: list[Counts]
    values: Arriving
    waits: list[tuple[Mark, Mark]]


class Loop:
    """Steps a stack until each of its carry-ons is finished or has failed.

    The stack's rows are the feeds' members, in order. What a step comes to is read while the device
    is at the next one, so that it never waits for the host. A feed is closed with its last member,
    and else by whoever made it. ``score`` returns the dev losses of the members of a feed, stacked;
    ``finish`` publishes a member.
    """

    def __init__(
        self,
        stack: Stack,
        feeds: list[Feed],
        bar: Bar,
        *,
        ranks: Ranks,
        device: torch.device,
        score: Callable[[Feed, CarryOn], list[DevLoss] | None],
        finish: Callable[[Member], None],
    ):
        self._feeds, self._bar = feeds, bar
        self._taken: Taken | None = None
        self._ranks, self._device = ranks, device
        self._score, self._finish = score, finish
        self._on(stack)

    def _on(self, stack: Stack) -> None:
        """Go on with a stack."""
        self._stack = stack
        recorded = recordable(stack.recipe, len(self._rows()))
        self._taker = Captured(stack, self._device) if recorded else stack

    def train(self) -> None:
        """Step until no member is left."""
        self._let_go()
        self._clock = time.perf_counter()
        self._waits: list[tuple[Mark, Mark]] = []
        while self._feeds:
            with self._waiting():
                ended = [feed for feed in self._feeds if not feed.advance()]
            if ended:
                self._read()
                began = time.perf_counter()
                for feed in ended:
                    self._end_epoch(feed)
                self._clock += time.perf_counter() - began
            else:
                self._step()
            self._let_go()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Mark a wait for batches: what of it the device is without work, counts."""
        began = Mark(self._device)
        yield
        self._waits.append((began, Mark(self._device)))

    def _rows(self) -> list[tuple[int, Member]]:
        return list(enumerate(member for feed in self._feeds for member in feed.members))

    def _step(self) -> None:
        """Begin a step, and take note of the one before while the device works on it."""
        here = [inputs.batch.total for inputs in self._due()]
        due = any(member.save_due for _, member in self._rows())
        everywhere, due = self._ranks.agree(here, due)
        values = self._take(everywhere)
        counts = [
            one for one, feed in zip(everywhere, self._feeds, strict=True) for _ in feed.members
        ]
        waits, self._waits = self._waits, []
        taken = Taken([member for _, member in self._rows()], counts, Arriving(*values), waits)
        self._read()
        self._taken = taken
        if due:  # in all processes, which see one that fails at the same step
            self._read()
            for index, member in self._rows():
                with failing(member):
                    if member.failure is None and member.save_due:
                        member.save(self._stack, index)
            self._clock = time.perf_counter()

    def _read(self) -> None:
        """Take note of the step that was begun last, if that was not done."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        losses, norms = taken.values.lists()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        waited = sum(began.until(ended) for began, ended in taken.waits)
        rows = zip(taken.members, taken.counts, losses, norms, strict=True)
        for index, (member, one, loss, norm) in enumerate(rows):
            if member.failure is not None:
                continue
            with failing(member):
                try:
                    member.require_finite(loss, norm)
                except EmbedcacheError:
                    member.save(self._stack, index)  # it stayed as it was before that step
                    raise
                member.count(
                    loss=loss,
                    norm=norm,
                    rate=member.rate(one.tokens),
                    tokens=one.tokens,
                    targets=one.targets,
                    batches=self._ranks.count,
                    seconds=seconds,
                    waited=waited,
                )
            self._bar.advance(one.tokens, f"loss {member.train_loss:.4f}")

    def _take(self, everywhere: Sequence[Counts]) -> tuple[Tensor, Tensor]:
        """Take a step, part by part; return losses and norms."""
        self._stack.begin(self._work(everywhere))
        loss_K = self._take_part(everywhere).clone()
        while not all(feed.ended for feed in self._feeds):
            with self._waiting():
                for feed in self._feeds:
                    feed.next_part()
            loss_K += self._take_part(everywhere)
        return self._taker.finish(loss_K)

    def _take_part(self, everywhere: Sequence[Counts]) -> Tensor:
        """Add the gradients of the part that is due, which nobody has after that."""
        differentiate = self._taker.prepared(self._work(everywhere))
        for feed in self._feeds:
            feed.let_go()
        return differentiate()

    def _due(self) -> list[StepInputs]:
        return [feed.due for feed in self._feeds if feed.due is not None]

    def _work(self, everywhere: Sequence[Counts]) -> list[Work]:
        """Return what each member does with the batch, or the part, that is due."""
        taken = self._taken
        unread = {} if taken is None else dict(zip(taken.members, taken.counts, strict=True))
        return [
            Work(
                inputs=inputs,
                targets=counts.targets,
                rate=member.rate(counts.tokens + (unread[member].tokens if unread else 0)),
            )
            for feed, inputs, counts in zip(self._feeds, self._due(), everywhere, strict=True)
            for member in feed.members
        ]

    def _end_epoch(self, feed: Feed) -> None:
        """Score dev and save."""
        if self._stack.recipe.part_tokens is not None:
            self._on(self._stack)  # within a budget, no recordings beside what scoring takes
        rows = [(index, member) for index, member in self._rows() if member in feed.members]
        stack = self._stack.model
        if len(self._feeds) > 1:
            stack = stack_of([self._stack.alone(index) for index, _ in rows])
        scores = self._score(feed, stack.to(self._device))
        for number, (index, member) in enumerate(rows):
            if member.failure is not None:
                continue
            with failing(member):
                dev = None if scores is None else scores[number]
                member.end_epoch(dev, self._stack.model.member(index))
                member.save(self._stack, index)

    def _let_go(self) -> None:
        """Let those leave the stack that are finished or have failed."""
        if any(member.failure is not None for _, member in self._rows()):
            self._read()
        left = []
        for index, member in self._rows():
            if member.failure is None and member.done:
                with failing(member):
                    self._finish(member)
            elif member.failure is None:
                left.append((index, member))
        staying = [member for _, member in left]
        if len(left) < len(self._rows()):
            for feed in self._feeds:
                feed.members = [member for member in feed.members if member in staying]
                if not feed.members:
                    feed.close()
            self._feeds = [feed for feed in self._feeds if feed.members]
            if left:
                self._on(self._stack.keep([index for index, _ in left]))


@contextmanager
def failing(member: Member) -> Iterator[None]:
    """Take an error as the end of one member, not of those beside it.

    Of one that other processes train, too, it ends this process: they would wait for it.
    """
    try:
        with translate_write_errors(member.out):
            yield
    except (EmbedcacheError, OSError) as error:
        if member.shared:
            raise
        member.failure = error
