"""Attention that never crosses a sequence: by a mask, or over spans of one long row.

Axes: K stacked carry-ons, B batch, N heads, T time, S time of keys, D head width, M sequences.
(K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True, slots=True)
class Spans:
    """Sequences that lie one behind the other in a batch of one row.

    ``starts_M``: int32 (K, M + 1), where each begins, and the row's length; equal ones are empty
    spans. ``longest``: tokens that none is longer than. No mask exists, and nothing is computed
    between sequences: on a GPU (bfloat16) this is the fastest way.
    """

    starts_M: Tensor
    longest: int


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, where: Tensor | Spans | None) -> Tensor:
    """Return attended_(K)BNTD, causal.

    ``where`` says what a query may see: mask_(K)BTS, spans, or None for all that comes before.
    """
    if isinstance(where, Spans):
        return _over_spans(q_BNTD, k_BNTD, v_BNTD, where)
    if q_BNTD.ndim == 4:
        mask = None if where is None else where[:, None]
        return F.scaled_dot_product_attention(
            q_BNTD, k_BNTD, v_BNTD, attn_mask=mask, is_causal=mask is None
        )
    # A stack's K joins the axis that the mask does not tell apart.
    K, B = q_BNTD.shape[:2]
    if where is not None and where.ndim == 3:
        q, k, v = (part.transpose(0, 1).flatten(1, 2) for part in (q_BNTD, k_BNTD, v_BNTD))
        return attend(q, k, v, where).unflatten(1, (K, -1)).transpose(0, 1)
    q, k, v = (part.flatten(0, 1) for part in (q_BNTD, k_BNTD, v_BNTD))
    mask = None if where is None else where.flatten(0, 1)
    return attend(q, k, v, mask).unflatten(0, (K, B))


def _over_spans(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, spans: Spans) -> Tensor:
    """Attend with all of a stack as heads of one row, or as rows one behind the other."""
    starts, T = spans.starts_M, q_BNTD.shape[-2]
    q, k, v = (part.squeeze(-4) for part in (q_BNTD, k_BNTD, v_BNTD))
    lead = q.shape[:-2]
    if starts.ndim == 1:
        q, k, v = (part.movedim(-2, 0).flatten(1, -2) for part in (q, k, v))
        attended = _varlen(q, k, v, starts, spans.longest)
        return attended.unflatten(1, lead).movedim(0, -2).unsqueeze(-4)
    K = len(starts)
    first_K1 = T * torch.arange(K, device=starts.device, dtype=starts.dtype)[:, None]
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
    attended = _varlen(q, k, v, (starts + first_K1).flatten(), spans.longest)
    return attended.unflatten(0, (K, T)).transpose(1, 2).unsqueeze(1)


def _varlen(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, starts_M: Tensor, longest: int) -> Tensor:
    if q_TND.device.type != "cpu":
        attended = varlen_attn(
            q_TND, k_TND, v_TND, starts_M, starts_M, longest, longest, window_size=(-1, 0)
        )
        return cast("Tensor", attended)
    time = torch.arange(len(q_TND), dtype=starts_M.dtype)
    mask = segment_mask(torch.bucketize(time, starts_M, right=True)[None])
    q, k, v = (part.transpose(0, 1)[None] for part in (q_TND, k_TND, v_TND))
    return attend(q, k, v, mask)[0].transpose(0, 1)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return mask_(K)BTS: causal, and never across segments; padding (-1) sees only its like."""
    T = segments_BT.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    return causal & (segments_BT[..., :, None] == segments_BT[..., None, :])
