"""Host memory for a block's embeddings on their way from the device to the encoders."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedcache.base.load import Base
from embedcache.cache.layout import ExtractSettings


def _finite_rows(x_NH: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return, for each row, whether every value of every tap is finite, on their device."""
    # A sum is finite only if every term is; in float32 the sum of finite embeddings is, too.
    return torch.stack([x.float().sum(dim=1).isfinite() for x in x_NH.values()]).all(dim=0)


@dataclass(frozen=True, slots=True)
class Slot:
    """Embeddings of one block in host memory; `release` lets the memory be used again."""

    x_NH: dict[str, torch.Tensor]
    finite_N: torch.Tensor
    release: Callable[[], None]


class HostBuffers:
    """A ring of pinned buffers, so that copies from a GPU run beside its next forward pass.

    Rows are checked for finite values where they were computed: on a GPU that is free, on the host
    it would take threads that the encoders need.
    """

    def __init__(self, base: Base, settings: ExtractSettings, count: int):
        self._cuda = base.device.type == "cuda"
        self._free: queue.Queue[tuple[dict[str, torch.Tensor], torch.Tensor]] = queue.Queue()
        rows = settings.block_tokens if self._cuda else 0
        for _ in range(count):
            x_NH = {
                tap: torch.empty(
                    rows, base.identity.hidden_size, dtype=base.dtype, pin_memory=self._cuda
                )
                for tap in settings.taps
            }
            self._free.put((x_NH, torch.empty(rows, dtype=torch.bool, pin_memory=self._cuda)))

    def fetch(self, x_NH: dict[str, torch.Tensor]) -> Callable[[], Slot]:
        """Begin the copy to the host; the returned function waits for it. Blocks while full."""
        buffer = self._free.get()
        finite_N = _finite_rows(x_NH)

        def release() -> None:
            self._free.put(buffer)

        if not self._cuda:
            return lambda: Slot(x_NH, finite_N, release)
        for tap, x in x_NH.items():
            buffer[0][tap].copy_(x, non_blocking=True)
        buffer[1].copy_(finite_N, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def ready() -> Slot:
            copied.synchronize()
            return Slot(*buffer, release)

        return ready
