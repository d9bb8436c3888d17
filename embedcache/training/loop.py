"""The training loop: steps, epochs and checkpoints."""

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
from embedcache.training.run.run import Run
from embedcache.training.scoring import DevLoss
from embedcache.training.step.batch_stream import BatchStream
from embedcache.training.step.cuda_graph import GraphedStack, capturable
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs
from embedcache.training.step.timestamps import Timestamp


class PendingValues:
    """Losses and gradient norms of a step, [K] each, that are being copied to the host."""

    def __init__(self, loss_K: Tensor, norm_K: Tensor):
        # A copy from a GPU goes to pinned memory.
        self._values_2K = torch.stack([loss_K, norm_K]).to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if loss_K.is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(loss_K.device))

    def lists(self) -> list[list[float]]:
        """Wait for the copy, and return losses and norms."""
        if self._there is not None:
            self._there.synchronize()
        values: list[list[float]] = self._values_2K.tolist()
        return values


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A launched step whose values are not read yet: its runs, counts, values and data waits."""

    runs: list[Run]
    counts: list[Counts]
    values: PendingValues
    waits: list[tuple[Timestamp, Timestamp]]


class Loop:
    """Trains a stack until each of its runs is finished or has failed.

    The rows of the stack are the runs of the streams, in order. The values of a step are read while
    the device computes the next one, so that the device never waits for the host. A stream is
    closed after its last run. ``score`` returns the dev losses of a stream's runs; ``finish``
    publishes a run.
    """

    def __init__(
        self,
        stack: Stack,
        streams: list[BatchStream],
        bar: Bar,
        *,
        ranks: Ranks,
        device: torch.device,
        score: Callable[[BatchStream, CarryOn], list[DevLoss] | None],
        finish: Callable[[Run], None],
    ):
        self._streams, self._bar = streams, bar
        self._pending: PendingStep | None = None
        self._settled = True
        """Whether no step of the optimiser is under way, so that the weights can be saved."""
        self._ranks, self._device = ranks, device
        self._score, self._finish = score, finish
        self._on(stack)

    def _on(self, stack: Stack) -> None:
        """Train this stack from now on."""
        self._stack = stack
        graphed = capturable(stack.settings, len(self._rows()))
        self._stepper = GraphedStack(stack, self._device) if graphed else stack

    def train(self) -> None:
        """Train until no run is left.

        When memory runs out, every run is saved at its last complete step, then
        ``torch.OutOfMemoryError`` is raised. If memory runs out during the optimiser's step, the
        weights may be partly updated: they are not saved, and the last checkpoint is kept.
        """
        try:
            self._train()
        except torch.OutOfMemoryError:
            if self._settled:
                self._read()
                self._save(lambda run: run.summary is None)
            raise

    def _train(self) -> None:
        self._remove_ended()
        self._clock = time.perf_counter()
        self._waits: list[tuple[Timestamp, Timestamp]] = []
        while self._streams:
            with self._waiting():
                ended = [stream for stream in self._streams if not stream.advance()]
            if ended:
                self._read()
                began = time.perf_counter()
                for stream in ended:
                    self._end_epoch(stream)
                self._clock += time.perf_counter() - began
            else:
                self._step()
            self._remove_ended()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Measure a wait for batches: the time in which the device has no work."""
        began = Timestamp(self._device)
        yield
        self._waits.append((began, Timestamp(self._device)))

    def _rows(self) -> list[tuple[int, Run]]:
        return list(enumerate(run for stream in self._streams for run in stream.runs))

    def _step(self) -> None:
        """Launch a step, and record the previous step while the device computes."""
        here = [inputs.batch.total for inputs in self._due()]
        due = any(run.save_due for _, run in self._rows())
        everywhere, due = self._ranks.agree(here, due)
        values = self._take(everywhere)
        counts = [
            one for one, stream in zip(everywhere, self._streams, strict=True) for _ in stream.runs
        ]
        waits, self._waits = self._waits, []
        pending = PendingStep(
            [run for _, run in self._rows()], counts, PendingValues(*values), waits
        )
        self._read()
        self._pending, self._settled = pending, True
        if due:  # in all processes, so that all see a failure at the same step
            self._read()
            self._save(lambda run: run.save_due)
            self._clock = time.perf_counter()

    def _save(self, due: Callable[[Run], bool]) -> None:
        """Save the runs that are due and have not failed."""
        for index, run in self._rows():
            with failing(run):
                if run.failure is None and due(run):
                    run.save(self._stack, index)

    def _read(self) -> None:
        """Record the pending step, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        losses, norms = pending.values.lists()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        waited = sum(began.until(ended) for began, ended in pending.waits)
        rows = zip(pending.runs, pending.counts, losses, norms, strict=True)
        for index, (run, one, loss, norm) in enumerate(rows):
            if run.failure is not None:
                continue
            with failing(run):
                try:
                    run.require_finite(loss, norm)
                except EmbedcacheError:
                    run.save(self._stack, index)  # the step was skipped
                    raise
                run.count(
                    loss=loss,
                    norm=norm,
                    rate=run.rate(one.tokens),
                    tokens=one.tokens,
                    targets=one.targets,
                    batches=self._ranks.count,
                    seconds=seconds,
                    waited=waited,
                )
            self._bar.advance(one.tokens, f"loss {run.train_loss:.4f}")

    def _take(self, everywhere: Sequence[Counts]) -> tuple[Tensor, Tensor]:
        """Take a step, part by part; return losses and gradient norms."""
        self._stack.begin(self._work(everywhere))
        loss_K = self._take_part(everywhere).clone()
        while not all(stream.ended for stream in self._streams):
            with self._waiting():
                for stream in self._streams:
                    stream.next_part()
            loss_K += self._take_part(everywhere)
        self._settled = False
        return self._stepper.finish(loss_K)

    def _take_part(self, everywhere: Sequence[Counts]) -> Tensor:
        """Add the gradients of the part that is due, and release it."""
        differentiate = self._stepper.prepared(self._work(everywhere))
        for stream in self._streams:
            stream.release()
        return differentiate()

    def _due(self) -> list[StepInputs]:
        return [stream.due for stream in self._streams if stream.due is not None]

    def _work(self, everywhere: Sequence[Counts]) -> list[Work]:
        """Return the work of each run on the part that is due."""
        pending = self._pending
        unread = {} if pending is None else dict(zip(pending.runs, pending.counts, strict=True))
        return [
            Work(
                inputs=inputs,
                targets=counts.targets,
                rate=run.rate(counts.tokens + (unread[run].tokens if unread else 0)),
            )
            for stream, inputs, counts in zip(self._streams, self._due(), everywhere, strict=True)
            for run in stream.runs
        ]

    def _end_epoch(self, stream: BatchStream) -> None:
        """Score dev and save the runs of a stream."""
        if self._stack.settings.part_tokens is not None:
            self._on(self._stack)  # frees the graphs: scoring needs their memory
        rows = [(index, run) for index, run in self._rows() if run in stream.runs]
        stack = self._stack.model
        if len(self._streams) > 1:
            stack = stack_of([self._stack.alone(index) for index, _ in rows])
        scores = self._score(stream, stack.to(self._device))
        for number, (index, run) in enumerate(rows):
            if run.failure is not None:
                continue
            with failing(run):
                dev = None if scores is None else scores[number]
                run.end_epoch(dev, self._stack.model.member(index))
                run.save(self._stack, index)

    def _remove_ended(self) -> None:
        """Remove the runs that are finished or have failed."""
        if any(run.failure is not None for _, run in self._rows()):
            self._read()
        left = []
        for index, run in self._rows():
            if run.failure is None and run.done:
                with failing(run):
                    self._finish(run)
            elif run.failure is None:
                left.append((index, run))
        staying = [run for _, run in left]
        if len(left) < len(self._rows()):
            stack = self._stack.keep([index for index, _ in left]) if left else self._stack
            for stream in self._streams:
                stream.runs = [run for run in stream.runs if run in staying]
                if not stream.runs:
                    stream.close()
            self._streams = [stream for stream in self._streams if stream.runs]
            if left:
                self._on(stack)


@contextmanager
def failing(run: Run) -> Iterator[None]:
    """Record an error as the failure of one run, so that the other runs continue.

    If several processes train the run, the error is raised, because the other processes would wait
    for this one.
    """
    try:
        with translate_write_errors(run.out):
            yield
    except (EmbedcacheError, OSError) as error:
        if run.shared:
            raise
        run.failure = error
