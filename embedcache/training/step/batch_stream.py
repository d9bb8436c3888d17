"""The batches that some members of a stack see in step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedcache.data.batch import Batch
from embedcache.data.loader import BatchLoader
from embedcache.loss import ShortlistSampler
from embedcache.training.run.run import Member
from embedcache.training.step.step_inputs import StepInputs


class Feed:
    """One order of batches, and the members that are at the same place in it.

    ``due`` holds the batch that is due, or the part of it that is, with its shortlists; None before
    `advance`, and once it was let go of. ``ended``: whether that was the batch's last part.
    """

    def __init__(
        self, loader: BatchLoader, members: list[Member], shortlist: ShortlistSampler | None = None
    ):
        self.members = members
        self.shortlist = shortlist
        self.due: StepInputs | None = None
        self.ended = False
        self._nothing: StepInputs | None = None
        state = members[0].state
        self._batches = loader.epochs(
            range(state.epoch, max(member.config.epochs for member in members)),
            skip=state.position,
            prepare=self._preparing(state.step),
        )

    def advance(self) -> bool:
        """Have a batch due; False at the end of an epoch, once, after which the next one begins."""
        if self.due is None:
            self.due = next(self._batches)
        return self.due is not None

    def close(self) -> None:
        """End the reading of batches."""
        self._batches.close()

    def let_go(self) -> None:
        """Let go of what is due, which is used: its memory is that of the next."""
        assert self.due is not None
        self.ended = self.due.batch.last_part
        self._nothing = self._nothing or self.due.without_tokens()
        self.due = None

    def next_part(self) -> None:
        """Have the next part of the batch due; one without tokens where there is none."""
        self.due = self._nothing if self.ended else next(self._batches)

    def _preparing(self, step: int) -> Callable[[Batch], StepInputs]:
        """Return a function that draws the shortlists of batches from a step on, part by part."""
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
                generator.set_state(before)  # the same once more, if it is tried again
                raise
            if batch.last_part:
                generator, step = None, step + 1
            return StepInputs(batch, listed)

        return prepare
