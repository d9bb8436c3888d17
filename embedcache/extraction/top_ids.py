"""The tokens that the base thinks likely to follow each position.

Axes: N positions, n of them at a time, K ids of each, V vocabulary, H hidden.
"""

from __future__ import annotations

import math

import torch

from embedcache.base.head import Head
from embedcache.cache.format.layout import LIKELY

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits that exist at a time, about: on a CPU what is near its caches."""


@torch.no_grad()
def top_ids_of(x_NH: torch.Tensor, head: Head, k: int) -> torch.Tensor:
    """Return the top ids of each position, int32 [N, K], as `LIKELY` has them.

    Probabilities are as exact as the head's dtype.
    """
    weight_VH = head.weight_VH
    step = max(1, LOGITS.get(x_NH.device.type, LOGITS["cuda"]) // len(weight_VH))
    found_NK = torch.empty(len(x_NH), k, dtype=torch.int32, device=x_NH.device)
    for start in range(0, len(x_NH), step):
        logits_nV = head(x_NH[start : start + step].to(weight_VH.dtype))
        logit_nK, id_nK = logits_nV.topk(k, dim=1)
        least_n1 = logits_nV.logsumexp(dim=1, keepdim=True) + math.log(LIKELY)
        found_NK[start : start + step] = torch.where(logit_nK >= least_n1, id_nK + 1, 0)
    return found_NK
