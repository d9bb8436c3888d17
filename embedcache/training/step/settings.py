"""Settings that change the memory and speed of a training step, but not its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embedcache.base.head import Head
from embedcache.loss import Chunks, plan_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        part_tokens: tokens of a part, at most; a longer sequence is a part by itself. The gradient
            of a step is summed over its parts. None means that a step has one part.
        offload: whether the optimiser's states, 6 bytes for each parameter, are in host memory.
            Parameters and gradients on the device are then bfloat16 instead of float32. The
            optimiser updates float32 parameters in any case.
        recompute: whether a block's activations are computed again for its gradient.
        host_head: whether the head is in host memory. The rows of a shortlist, or all tiles in
            turn, are copied to the device for each part.
        delta_positions: positions whose x′ exists at a time; None means all positions of a part.
        logit_bytes: bytes of logits that exist at a time; None means a default of the device.
        ahead: parts that are prepared on the device beside the one in use.
        one_row: whether the sequences of a part lie in one row, with attention over spans.
        cuda_graph: whether steps of few carry-ons are captured as CUDA graphs; needs ``one_row``.
    """

    part_tokens: int | None = None
    offload: bool = False
    recompute: bool = False
    host_head: bool = False
    delta_positions: int | None = None
    logit_bytes: int | None = None
    ahead: int = 2
    one_row: bool = False
    cuda_graph: bool = False

    def chunks(self, head: Head, N: int, device: torch.device) -> Chunks:
        """Return the chunks in which the exact loss over N positions computes its logits."""
        V, H = head.weight_VH.shape
        return plan_chunks(
            N,
            V,
            head.weight_VH.dtype,
            device,
            budget=self.logit_bytes,
            streamed_hidden=H if head.weight_VH.device != device else 0,
        )


PLAIN = StepSettings()


def plain_settings(device: torch.device, head_width: int) -> StepSettings:
    """Return the step settings for a device with enough memory.

    Attention over spans needs an NVIDIA GPU of the Ampere generation or later, and attention heads
    whose width is a multiple of 8, up to 256.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return PLAIN
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    spans = modern and head_width % 8 == 0 and head_width <= 256
    return StepSettings(one_row=spans, cuda_graph=spans)
