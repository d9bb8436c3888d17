"""How a step is computed, where that changes its memory and speed but not what is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embedcache.base.head import Head
from embedcache.loss import Chunks, plan_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        part_tokens: tokens on the device at a time, at most (a longer sequence is there alone); a
            step's gradient is summed over its parts. None means the whole step's.
        offload: whether the optimiser's states, 6 bytes a weight, are in host memory, where a step
            reads and writes them; weights and gradients on the device are bfloat16 then, instead of
            float32. The optimiser works on float32 weights in any case.
        recompute: whether a block's activations are computed again for its gradient.
        host_head: whether the head is in host memory: a shortlist's rows, or all tiles in turn, go
            to the device for each part.
        emitted: positions of which deltas, and what else is as wide as the base, exist at a time;
            None means all of a part.
        logit_bytes: logits that exist at a time; None leaves it to the device.
        ahead: parts that are on the device, or on their way, beside the one that is used.
        one_row: whether a part's sequences lie one behind the other, with attention over spans.
        capture: whether steps of few carry-ons are recorded as CUDA graphs, and replayed; needs
            ``one_row``.
    """

    part_tokens: int | None = None
    offload: bool = False
    recompute: bool = False
    host_head: bool = False
    emitted: int | None = None
    logit_bytes: int | None = None
    ahead: int = 2
    one_row: bool = False
    capture: bool = False

    def chunks(self, head: Head, N: int, device: torch.device) -> Chunks:
        """Return how many logits of an exact loss over N positions exist at a time."""
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
    """Return how a step is computed where there is memory enough.

    Attention over spans wants a GPU of NVIDIA's Ampere generation or later, and heads whose width
    is a multiple of 8 up to 256.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return PLAIN
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    spans = modern and head_width % 8 == 0 and head_width <= 256
    return StepSettings(one_row=spans, capture=spans)
