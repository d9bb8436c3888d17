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

from embedcache.carryon.nn import blockwise

SPANS = 65_535
"""Spans that a GPU attends over at once, at most: an axis of its grid."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Sequences that lie one behind the other in a batch of one row.

    ``cu_seqlens_M``: int32 (K, M + 1), where each begins, and the row's length; equal ones are empty
    spans. ``longest``: tokens that none is longer than. No mask exists, and nothing is computed
    between sequences: on a GPU (bfloat16) this is the fastest way.
    """

    cu_seqlens_M: Tensor
    longest: int


def attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, where: Tensor | Spans | None) -> Tensor:
    """Return attended_(K)BTND, causal.

    ``where`` says what a query may see: mask_(K)BTS, spans, or None for all that comes before.
    """
    if isinstance(where, Spans):
        return _over_spans(q_BTND, k_BSND, v_BSND, where)
    if q_BTND.ndim == 4:
        if blockwise.fits(q_BTND, k_BSND):
            return blockwise.attend_blockwise(q_BTND, k_BSND, v_BSND, where)
        mask = None if where is None else where[:, None]
        q, k, v = (part.transpose(1, 2) for part in (q_BTND, k_BSND, v_BSND))
        attended_BNTD = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        return attended_BNTD.transpose(1, 2)
    K, B = q_BTND.shape[:2]
    if B > 1 and where is not None and where.ndim == 3:
        # A stack's K joins the axis that the mask does not tell apart.
        q, k, v = (part.movedim(0, 2).flatten(2, 3) for part in (q_BTND, k_BSND, v_BSND))
        return attend(q, k, v, where).unflatten(2, (K, -1)).movedim(2, 0)
    q, k, v = (part.flatten(0, 1) for part in (q_BTND, k_BSND, v_BSND))
    mask = where.flatten(0, -3) if where is not None else None
    return attend(q, k, v, mask).unflatten(0, (K, B))


def _over_spans(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, spans: Spans) -> Tensor:
    """Attend over one row, or over those of a stack, one behind the other."""
    q, k, v = (part.flatten(0, -3) for part in (q_BTND, k_BTND, v_BTND))
    T = q_BTND.shape[-3]
    rows = len(q) // T
    cu_seqlens_KM = spans.cu_seqlens_M.expand(rows, -1)
    each = max(1, SPANS // cu_seqlens_KM.shape[1])
    if rows > each:
        cuts = [x.split(each) for x in (q_BTND, k_BTND, v_BTND, cu_seqlens_KM)]
        return torch.cat(
            [
                _over_spans(q, k, v, Spans(starts, spans.longest))
                for q, k, v, starts in zip(*cuts, strict=True)
            ]
        )
    cu_seqlens_M = cu_seqlens_KM[0]
    if rows > 1:
        first_K1 = (
            T * torch.arange(rows, device=cu_seqlens_M.device, dtype=cu_seqlens_M.dtype)[:, None]
        )
        cu_seqlens_M = (cu_seqlens_KM + first_K1).flatten()
    return _varlen(q, k, v, cu_seqlens_M, spans.longest).view(q_BTND.shape)


def _varlen(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, cu_seqlens_M: Tensor, longest: int
) -> Tensor:
    if q_TND.device.type != "cpu":
        attended = varlen_attn(
            q_TND, k_TND, v_TND, cu_seqlens_M, cu_seqlens_M, longest, longest, window_size=(-1, 0)
        )
        return cast("Tensor", attended)
    # A CPU, where this is only tried, takes one after the other: no span's nan reaches another.
    lengths = cu_seqlens_M.diff().tolist()
    spans = zip(*(x[None].split(lengths, dim=1) for x in (q_TND, k_TND, v_TND)), strict=True)
    return torch.cat([attend(q, k, v, None)[0] for q, k, v in spans if q.numel()])


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return mask_(K)BTS: causal, and never across segments; padding (-1) sees only its like."""
    T = segments_BT.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    small_BT = segments_BT.int()  # half as much to compare
    return causal & (small_BT[..., :, None] == small_BT[..., None, :])
