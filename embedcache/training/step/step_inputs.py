"""The inputs of one part of a training step: a batch, and the shortlists of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from embedcache.data.batch import Batch
from embedcache.loss import Shortlist


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch, or a part of one, and the other inputs of the loss.

    Args:
        batch: the sequences and their targets.
        shortlists: the subsets of the vocabulary that the loss runs over, for consecutive
            predicted positions; empty for the exact loss.
        weight_N: float32, the weight of each predicted position's loss: 1, or 0 for positions that
            pad N. None weights all by 1.
    """

    batch: Batch
    shortlists: Sequence[Shortlist] = ()
    weight_N: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors on the loader's device."""
        drawn = [value for one in self.shortlists for value in one if isinstance(value, Tensor)]
        return [*self.batch.tensors(), *drawn]

    def without_tokens(self) -> StepInputs:
        """Return inputs of padding only, for a stack whose other batches have more parts."""
        return StepInputs(self.batch.without_tokens())
