"""The CUDA allocator: its configuration, a limit on it, and the peak of allocated memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedcache.device import synchronize

SMALL_SEGMENT = 12 << 20
"""Bytes that the allocator reserves at a time with the settings of `configure_allocator`."""
DEFAULT_SEGMENT = 20 << 20
"""Bytes that PyTorch's allocator reserves at a time by default."""
SETTINGS = f"expandable_segments:True,large_segment_size_mb:{SMALL_SEGMENT >> 20}"


def configure_allocator() -> None:
    """Set the environment so that PyTorch and cuBLAS reserve little of a GPU.

    Expandable segments leave no gaps, and grow by 12 MiB instead of 20. cuBLAS keeps 8 MiB for each
    stream instead of 32. Variables that the user has set are not changed. Both libraries read the
    variables once, when they first use the GPU; a later call has no effect.
    """
    if not torch.cuda.is_initialized() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", SETTINGS)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")


def segment_bytes() -> int:
    """Return the number of bytes by which the allocator may exceed a limit."""
    ours = os.environ.get("PYTORCH_ALLOC_CONF") == SETTINGS
    return SMALL_SEGMENT if ours else DEFAULT_SEGMENT


@contextmanager
def memory_limit(budget: int | None, device: torch.device) -> Iterator[None]:
    """Limit the allocator's reserved memory to ``budget`` bytes. On a CPU, nothing is limited.

    Raises ``torch.OutOfMemoryError`` if more is needed.
    """
    if budget is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    share = max(0, budget - segment_bytes()) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made in its ``with`` block; ``peak`` is the maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self._known:
                    self._known.add(key)
                    self._live += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return made

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._live -= count


@contextmanager
def peak_memory(device: torch.device, resident: Iterable[torch.Tensor]) -> Iterator[list[int]]:
    """Measure the peak memory of the block in bytes; append it to the yielded list at exit.

    On CUDA, this is the peak of the memory that the allocator allocated. On a CPU, it counts the
    ``resident`` tensors and all tensors that the calling thread made.
    """
    peak: list[int] = []
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        synchronize(device)
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    with _LiveBytes() as live:
        yield peak
    peak.append(live.peak + sum(tensor.nbytes for tensor in resident))
