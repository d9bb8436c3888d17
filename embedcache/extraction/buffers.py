"""Host memory for a block's integers on their way from the device to the coders."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

import torch

Encoded = dict[str, torch.Tensor]
"""Integers of a block by array path under the split, such as ``embeddings/final``: [R, ...]."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The integers of one block in host memory; `release` lets the memory be used again."""

    arrays: Encoded
    finite_N: torch.Tensor
    release: Callable[[], None]


class HostBuffers:
    """A ring of pinned buffers, so that copies from a GPU run beside its next forward pass."""

    def __init__(self, device: torch.device, count: int):
        self._cuda = device.type == "cuda"
        self._to_make = count
        self._free: queue.Queue[tuple[Encoded, torch.Tensor]] = queue.Queue()

    def _buffer(self, arrays: Encoded, finite_N: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
        if not self._to_make:
            return self._free.get()
        self._to_make -= 1
        if not self._cuda:
            return {}, torch.empty(0)

        def like(value: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(value, device="cpu", pin_memory=True)

        return {name: like(value) for name, value in arrays.items()}, like(finite_N)

    def fetch(self, arrays: Encoded, finite_N: torch.Tensor) -> Callable[[], Slot]:
        """Begin the copy to the host; the returned function waits for it. Blocks while full."""
        buffer = self._buffer(arrays, finite_N)

        def release() -> None:
            self._free.put(buffer)

        if not self._cuda:
            return lambda: Slot(arrays, finite_N, release)
        for name, value in arrays.items():
            buffer[0][name].copy_(value, non_blocking=True)
        buffer[1].copy_(finite_N, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def ready() -> Slot:
            copied.synchronize()
            return Slot(*buffer, release)

        return ready
