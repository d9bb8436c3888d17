"""Host memory for a block's integers on their way from the device to the coders."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedcache.units import rounded_up

Encoded = dict[str, torch.Tensor]
"""Integers of a block by array path under the split, such as ``embeddings/final``: [R, ...]."""

ALIGNMENT = 64
"""Bytes at whose multiples a tensor begins in a buffer."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The integers of one block in host memory; `release` lets the memory be used again."""

    arrays: Encoded
    finite_N: torch.Tensor
    release: Callable[[], None]


class HostBuffers:
    """A ring of buffers, pinned where copies from a GPU run beside its next forward pass.

    A buffer is bytes, not tensors: the splits of a cache differ in arrays, dtypes and shapes.
    """

    def __init__(self, device: torch.device, count: int):
        self._cuda = device.type == "cuda"
        self._free: queue.Queue[torch.Tensor] = queue.Queue()
        for _ in range(count):
            self._free.put(torch.empty(0, dtype=torch.uint8))

    def fetch(self, arrays: Encoded, finite_N: torch.Tensor) -> Callable[[], Slot]:
        """Begin the copy to the host; the returned function waits for it. Blocks while full."""
        values = [*arrays.values(), finite_N]
        sizes = [rounded_up(value.nbytes, ALIGNMENT) for value in values]
        buffer = self._free.get()
        if len(buffer) < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._cuda)
        copies = []
        for value, room in zip(values, buffer[: sum(sizes)].split(sizes), strict=True):
            copies.append(room[: value.nbytes].view(value.dtype).view(value.shape))
            copies[-1].copy_(value, non_blocking=self._cuda)
        slot = Slot(
            dict(zip(arrays, copies, strict=False)), copies[-1], lambda: self._free.put(buffer)
        )
        copied = torch.cuda.Event() if self._cuda else None
        if copied is not None:
            copied.record()

        def ready() -> Slot:
            if copied is not None:
                copied.synchronize()
            return slot

        return ready
