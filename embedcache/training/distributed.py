"""The processes of a training run that ``torchrun`` started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist

from embedcache.data.batch import Counts

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ``rank`` of this process among ``count`` processes. Rank 0 writes files."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def agree(self, counts: list[Counts], due: bool) -> tuple[list[Counts], bool]:
        """Return the sums of counts over all processes, and whether ``due`` is true in any of them.

        The values are exchanged between hosts, so that no device has to wait.
        """
        if self.count == 1:
            return counts, due
        *sums, any_due = self.sum(torch.tensor([*chain(*counts), due])).tolist()
        return [Counts(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)], bool(any_due)

    def wait(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(1))

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


ALONE = Ranks()


def is_leader() -> bool:
    """Say whether this process has rank 0, or was started without ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: torch.device) -> torch.device:
    """Return the device with its number: under ``torchrun``, the CUDA device of this process."""
    if device.type != "cuda" or device.index is not None:
        return device
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", torch.cuda.current_device() if local is None else int(local))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, by NCCL for CUDA devices and gloo for hosts.

    The process group is made once per process, and destroyed when the process exits. After a
    failure it is not destroyed, because the other processes may wait for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    try:
        yield Ranks(rank=dist.get_rank(), count=dist.get_world_size())
    except BaseException:
        atexit.unregister(dist.destroy_process_group)
        raise
