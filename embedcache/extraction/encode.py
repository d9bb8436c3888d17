"""Encoding a block on its device, and copying the encoded arrays to host memory.

Axes: N rows of a block, H hidden, J top ids, V vocabulary.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from embedcache.base.head import Head
from embedcache.base.taps import FINAL
from embedcache.cache.codecs.integers import ArraySpec, Codec
from embedcache.cache.format.layout import LIKELY, TOP_IDS, ExtractSettings, block_arrays
from embedcache.units import round_up

Array = np.ndarray[Any, Any]
EncodedArrays = dict[str, torch.Tensor]
"""Encoded arrays of a block by path under the split, such as ``embeddings/final``; each [N, …]."""

ALIGNMENT = 64
"""Tensors in a host buffer start at multiples of this many bytes."""
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Approximate number of logits in memory at a time. On a CPU they should stay near its caches."""


class BlockEncoder:
    """Encodes blocks of one split with the codec of each tap, and finds their top ids."""

    def __init__(
        self,
        split: str,
        settings: ExtractSettings,
        codecs: dict[str, Codec],
        head: Head,
    ):
        self._codecs = codecs
        self._head = head
        self._top_ids = settings.top_ids
        self.specs: dict[str, ArraySpec] = block_arrays(split, settings)
        """The arrays of a block by path under the split."""

    def __call__(
        self, x_NH: dict[str, torch.Tensor], ids_N: Array, rows: int
    ) -> tuple[EncodedArrays, torch.Tensor]:
        """Encode a block.

        Args:
            x_NH: embeddings by tap. A row with a value that is not finite is encoded as zeros.
            ids_N: token ids.
            rows: number of rows in use. Encoded values of later rows are zero.

        Returns:
            The encoded arrays, and finite_N: whether every value of every tap is finite. Both stay
            on the device: the check is free on a GPU, and would take CPU time from the coders.
        """
        finite_N = finite_rows(x_NH)
        arrays = {}
        for tap, codec in self._codecs.items():
            clean_NH = torch.where(finite_N[:, None], x_NH[tap], 0)
            for group, values in codec.encode(clean_NH, ids_N).items():
                values[rows:] = 0
                arrays[f"{group}/{tap}"] = values
        if self._top_ids:
            found_NJ = top_ids_of(x_NH[FINAL][:rows], self._head, self._top_ids)
            arrays[TOP_IDS] = F.pad(found_NJ, (0, 0, 0, len(finite_N) - rows))
        return arrays, finite_N


def finite_rows(x_NH: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return for each row whether every value of every tap is finite, as bool [N]."""
    # A sum is finite only if every term is; the float32 sum of finite embeddings is finite, too.
    return torch.stack([x.float().sum(dim=1).isfinite() for x in x_NH.values()]).all(dim=0)


@torch.no_grad()
def top_ids_of(x_NH: torch.Tensor, head: Head, k: int) -> torch.Tensor:
    """Return the ``k`` likeliest next tokens of each position, int32 [N, J].

    Entries are 1 + token id, likeliest first, and 0 for tokens less likely than `LIKELY`.
    Probabilities are as exact as the head's dtype.
    """
    weight_VH = head.weight_VH
    step = max(1, LOGITS.get(x_NH.device.type, LOGITS["cuda"]) // len(weight_VH))
    found_NJ = torch.empty(len(x_NH), k, dtype=torch.int32, device=x_NH.device)
    for start in range(0, len(x_NH), step):
        logits_NV = head(x_NH[start : start + step].to(weight_VH.dtype))
        logit_NJ, id_NJ = logits_NV.topk(k, dim=1)
        least_N1 = logits_NV.logsumexp(dim=1, keepdim=True) + math.log(LIKELY)
        found_NJ[start : start + step] = torch.where(logit_NJ >= least_N1, id_NJ + 1, 0)
    return found_NJ


@dataclass(frozen=True, slots=True)
class Slot:
    """An encoded block in host memory. `release` returns the memory to the ring of buffers."""

    arrays: EncodedArrays
    finite_N: torch.Tensor
    release: Callable[[], None]


class HostBuffers:
    """A ring of host buffers, pinned on CUDA so that copies overlap the next forward pass.

    A buffer holds bytes, since the splits of a cache differ in arrays, dtypes and shapes.
    """

    def __init__(self, device: torch.device, count: int):
        self._cuda = device.type == "cuda"
        self._free: queue.Queue[torch.Tensor] = queue.Queue()
        for _ in range(count):
            self._free.put(torch.empty(0, dtype=torch.uint8))

    def fetch(self, arrays: EncodedArrays, finite_N: torch.Tensor) -> Callable[[], Slot]:
        """Start a copy to the host and return a function that waits for it.

        Blocks while every buffer is in use.
        """
        values = [*arrays.values(), finite_N]
        sizes = [round_up(value.nbytes, ALIGNMENT) for value in values]
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
