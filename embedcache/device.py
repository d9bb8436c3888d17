"""Devices, dtypes, and the state of CUDA that several modules share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from embedcache.errors import UsageError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")
"""CPU capabilities, as torch names them, with which bfloat16 products are faster than float32."""


def resolve_device(device: str) -> torch.device:
    """Return the device named; ``auto`` is CUDA if there is a GPU, else the CPU.

    Raises:
        UsageError: the device is unknown, or torch sees no CUDA device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"a device is auto, cpu, cuda or cuda:N; found '{device}'. Set `device=` to auto."
        ) from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"expected a CUDA device for '{device}', and torch sees no CUDA device. "
            "Set `device=` to cpu."
        )
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype named; ``auto`` is bfloat16 on CUDA, else float32.

    Raises:
        UsageError: the dtype is unknown.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UsageError(
            f"a dtype is auto, {', '.join(DTYPES)}; found '{dtype}'.{nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of products in extraction and training: bfloat16 where it is fast.

    On a CPU without AMX or AVX512-BF16, bfloat16 is not faster than float32. Weights, gradients and
    the optimiser's state are float32 on every device. Evaluation uses `resolve_dtype`.
    """
    if device.type == "cpu" and not any(map(torch.cpu.get_capabilities().get, BFLOAT16_UNITS)):
        return torch.float32
    return torch.bfloat16


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes; for the CPU, that of the machine.

    Memory that torch's allocator holds and does not use counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


capture_lock = threading.Lock()
"""Lock held while a CUDA graph is captured. Other threads must not allocate memory on the device
during the capture, because the allocator cannot free any."""


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def device_context(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which ``device`` is CUDA's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def any_shape_attention() -> Iterator[None]:
    """A context without cuDNN's attention, which plans each new shape for about 0.1 s.

    Nearly every batch has a new shape; the other kernels need no plan.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
