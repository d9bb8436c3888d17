"""A device's allocator: what it gave out at the most, and keeping it within a budget."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedcache.device import wait_for

SEGMENT = 12 << 20
"""Bytes that a CUDA allocator reserves at a time within a budget: it takes no less than that."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered; ``peak`` is the most at a time."""

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
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return made

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._live -= count


@contextmanager
def peak_of(device: torch.device, resident: Iterable[torch.Tensor]) -> Iterator[list[int]]:
    """Put into the list, at the end, the most bytes that were in use at a time.

    On CUDA those that the allocator had given out; on a CPU those of ``resident`` tensors, and of
    all that the calling thread made.
    """
    peak: list[int] = []
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        wait_for(device)
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    with _LiveBytes() as live:
        yield peak
    peak.append(live.peak + sum(tensor.nbytes for tensor in resident))


def spare_reserves() -> None:
    """Have libraries reserve little of a GPU that nothing was computed on yet in this process.

    Unless the user says otherwise: segments that grow leave no gaps, and do so by 12 MiB instead of
    20; and cuBLAS keeps 8 MiB for each of its streams instead of 32.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name before
        growing = f"expandable_segments:True,large_segment_size_mb:{SEGMENT >> 20}"
        os.environ.setdefault("PYTORCH_ALLOC_CONF", growing)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")


@contextmanager
def held(budget: int | None, device: torch.device) -> Iterator[None]:
    """Let the allocator reserve no more than a budget meanwhile; of a CPU nothing is held."""
    if budget is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    share = max(0, budget - SEGMENT) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
