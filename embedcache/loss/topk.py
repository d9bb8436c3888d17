"""The likeliest tokens under a head.

Axes: N positions, H hidden, K likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.base.head import Head

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes of float32 logits held at a time. On a CPU small enough to stay near the caches."""


def likeliest(x_NH: Tensor, head: Head, count: int) -> Tensor:
    """Return the ``count`` likeliest tokens of each position under the head, int64 [N, count].

    ``count`` must not be above the vocabulary's size.
    """
    found = torch.empty(len(x_NH), count, dtype=torch.long, device=x_NH.device)
    for rows in row_chunks(len(x_NH), head.weight_VH.shape[0], x_NH.device):
        found[rows] = head(x_NH[rows]).topk(count, dim=1, sorted=False).indices
    return found


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Cut rows into chunks whose float32 logits stay under ``CHUNK_BYTES`` of the device."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    size = max(1, budget // (4 * columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
