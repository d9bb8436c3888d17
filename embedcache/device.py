"""Which device and precision to compute on."""

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
"""What a CPU that multiplies bfloat16 faster than float32 is able to, as torch names it."""


def resolve_device(device: str) -> torch.device:
    """Return the device named; ``auto`` is CUDA where there is one, else the CPU.

    Raises ``UsageError`` for an unknown device, or CUDA where torch sees none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"a device is auto, cpu, cuda or cuda:N; found '{device}'. Type: --device auto"
        ) from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"the device {device} was asked for, and torch sees no CUDA device. Type: --device cpu"
        )
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype named; ``auto`` is bfloat16 on CUDA, else float32.

    Raises ``UsageError`` for an unknown dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UsageError(
            f"a dtype is auto, {', '.join(DTYPES)}; found '{dtype}'.{nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of products where speed counts: bfloat16 where a device has units for it.

    Of CPUs, those with AMX or AVX512-BF16: on others bfloat16 is no faster than float32, or slower.
    So it is for extraction and for training, whose weights, gradients and optimiser are float32
    everywhere; figures that are reported are in `resolve_dtype`'s.
    """
    if device.type == "cpu" and not any(map(torch.cpu.get_capabilities().get, BFLOAT16_UNITS)):
        return torch.float32
    return torch.bfloat16


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has free; of the machine for the CPU.

    What torch keeps of a GPU without using it is free, too.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def wait_for(device: torch.device) -> None:
    """Return when all is done that was launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


recording = threading.Lock()
"""Held while a CUDA graph is recorded: the allocator gives nothing back meanwhile, so that others
who take memory on the device wait."""


@cache
def has_triton() -> bool:
    """Say whether Triton is installed, which compiles kernels for a GPU."""
    return find_spec("triton") is not None


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one that streams and recordings are of, where nobody names one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def any_shape_attention() -> Iterator[None]:
    """Compute attention with kernels that take any shape at once.

    cuDNN's plans each new shape for about 0.1 s, and nearly every batch here is one.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
