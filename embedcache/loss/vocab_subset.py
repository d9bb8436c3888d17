"""The columns of a softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabSubset:
    """The tokens a softmax runs over: their head rows, biases and log-weights.

    ``weight_CH``; ``bias_C`` or None; ``log_weight_C``, added to the logits, or None.
    """

    weight_CH: Tensor
    bias_C: Tensor | None
    log_weight_C: Tensor | None
