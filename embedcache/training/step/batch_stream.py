"""A stream of batches, and the runs of a stack that share it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedcache.data.batch import Batch
from embedcache.data.loader import BatchLoader
from embedcache.loss import ShortlistSampler
from embedcache.training.run.run import Run
from embedcache.training.step.step_inputs import StepInputs


class BatchStream:
    """One order of batches, and the runs that are at the same place in it.

    Attributes:
        runs: the runs.
        shortlist: draws the shortlists of their loss; None for the exact loss.
        due: the current batch, or the current part of one, with its shortlists; None before
            `advance` and after `release`.
        ended: whether the part that was released last was the batch's last one.
    """

    def __init__(
        self, loader: BatchLoader, runs: list[Run], shortlist: ShortlistSampler | None = None
    ):
        self.runs = runs
        self.shortlist = shortlist
        self.due: StepInputs | None = None
        self.ended = False
        self._nothing: StepInputs | None = None
        state = runs[0].state
        self._batches = loader.epochs(
            range(state.epoch, max(run.config.epochs for run in runs)),
            skip=state.position,
            prepare=self._preparing(state.step),
        )

    def advance(self) -> bool:
        """Make the next batch due. Return False, with none due, once at the end of each epoch."""
        if self.due is None:
            self.due = next(self._batches)
        return self.due is not None

    def close(self) -> None:
        """Stop reading batches."""
        self._batches.close()

    def release(self) -> None:
        """Release the part that is due after its use, so that the next one can take its memory."""
        assert self.due is not None
        self.ended = self.due.batch.last_part
        self._nothing = self._nothing or self.due.without_tokens()
        self.due = None

    def next_part(self) -> None:
        """Make the next part of the batch due, or an empty part after the last one."""
        self.due = self._nothing if self.ended else next(self._batches)

    def _preparing(self, step: int) -> Callable[[Batch], StepInputs]:
        """Return a function that draws the shortlists of parts, beginning at ``step``."""
        shortlist = self.shortlist
        if shortlist is None:
            return StepInputs
        generator: torch.Generator | None = None

        def prepare(batch: Batch) -> StepInputs:
            nonlocal generator, step
            generator = generator or shortlist.generator(step)
            before = generator.get_state()
            try:
                listed = shortlist.draw(batch.targets_N, generator, batch.top_ids_NJ)
            except torch.OutOfMemoryError:
                generator.set_state(before)  # so that a second try draws the same
                raise
            if batch.last_part:
                generator, step = None, step + 1
            return StepInputs(batch, listed)

        return prepare
