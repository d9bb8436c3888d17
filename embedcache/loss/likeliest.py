"""The likeliest tokens under a head.

Axes: N positions, H hidden, K likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss.chunks import row_chunks


def likeliest(x_NH: Tensor, head: Head, count: int) -> Tensor:
    """Return the ``count`` likeliest tokens of each position under the head, int64 [N, count].

    ``count`` must not be above the vocabulary's size.
    """
    found = torch.empty(len(x_NH), count, dtype=torch.long, device=x_NH.device)
    for rows in row_chunks(len(x_NH), head.weight_VH.shape[0], x_NH.device):
        found[rows] = head(x_NH[rows]).topk(count, dim=1, sorted=False).indices
    return found
