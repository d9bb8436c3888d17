"""Shortlists, and the cross-entropy over them.

Axes: N positions, n positions of a shortlist, G carry-ons that share a batch, H hidden, C columns
of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss.chunks import plan_chunks
from embedcache.loss.linear_cross_entropy import linear_cross_entropy
from embedcache.loss.tiles import VocabSubset


class Shortlist(NamedTuple):
    """The columns of the softmax of N consecutive positions, and the column of each label.

    ``weight_CH``, ``bias_C`` and ``log_weight_C`` are those of `embedcache.loss.VocabSubset`;
    ``index_N`` are indices of columns.
    """

    weight_CH: Tensor
    bias_C: Tensor | None
    log_weight_C: Tensor
    index_N: Tensor


def slice_shortlists(shortlists: Sequence[Shortlist], positions: slice) -> list[Shortlist]:
    """Return the shortlists of some of the positions that consecutive shortlists are for."""
    found, first = [], 0
    for one in shortlists:
        start, stop = max(positions.start - first, 0), positions.stop - first
        if start < len(one.index_N) and stop > 0:
            found.append(one._replace(index_N=one.index_N[start:stop]))
        first += len(one.index_N)
    return found


def shortlist_cross_entropy(
    x_GNH: Tensor, shortlists: Sequence[Shortlist], head: Head, *, logit_bytes: int | None = None
) -> Tensor:
    """Return the estimated cross-entropy of each position, float32 [G, N], in nats.

    Args:
        x_GNH: embeddings after each of G carry-ons, in the head's dtype.
        shortlists: of consecutive positions, N in all, on the device of ``x_GNH``.
        head: gives scale and soft-cap; its weight is not read.
        logit_bytes: bytes of logits that exist at a time; by default `plan_chunks` decides.
    """
    losses = []
    sizes = [len(one.index_N) for one in shortlists]
    # A single part is not split: the gradient would be copied.
    parts = [x_GNH] if len(sizes) == 1 else x_GNH.split(sizes, dim=1)
    for one, x_GnH in zip(shortlists, parts, strict=True):
        subset = VocabSubset(
            one.weight_CH, one.bias_C, one.log_weight_C, head.logit_scale, head.softcap
        )
        x_NH, index_N = x_GnH.flatten(0, 1), one.index_N
        index_N = index_N if len(x_GnH) == 1 else index_N.repeat(len(x_GnH))
        chunks = plan_chunks(
            len(x_NH), len(subset), one.weight_CH.dtype, x_NH.device, budget=logit_bytes
        )
        loss_N = linear_cross_entropy(x_NH, head, index_N, subset=subset, chunks=chunks)
        losses.append(loss_N.view(x_GnH.shape[:2]))
    return torch.cat(losses, dim=1)
