"""Causal attention within sequences, by a mask or over spans of one long row.

Axes: K stacked carry-ons, B rows of a batch, T time, U keys, E heads, F width of a head, M
boundaries of sequences. (K) stands for an axis that only a stack has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from embedcache.carryon.nn import blockwise

MAX_SPANS = 65_535
"""Most spans of one call on a GPU: the size of an axis of its grid."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Sequences that lie one behind the other in a batch of one row.

    No mask exists, and nothing is computed between sequences: on a GPU, in bfloat16, this is the
    fastest attention.

    Attributes:
        cu_seqlens_M: int32 (K)M, where each sequence starts, and the row's length. Equal entries
            are empty sequences.
        longest: an upper bound of the length of a sequence.
    """

    cu_seqlens_M: Tensor
    longest: int


def attend(q_BTEF: Tensor, k_BUEF: Tensor, v_BUEF: Tensor, where: Tensor | Spans | None) -> Tensor:
    """Return the attended values, (K)BTEF.

    Args:
        q_BTEF: queries, with K as the first axis of a stack.
        k_BUEF: keys.
        v_BUEF: values.
        where: the keys that a query sees: a causal mask_(K)BTU, `Spans`, or None for all earlier
            positions.
    """
    if isinstance(where, Spans):
        return _over_spans(q_BTEF, k_BUEF, v_BUEF, where)
    if q_BTEF.ndim == 4:
        if where is not None and blockwise.applies(q_BTEF, k_BUEF):
            return blockwise.attend_blockwise(q_BTEF, k_BUEF, v_BUEF, where)
        mask = None if where is None else where[:, None]
        q, k, v = (part.transpose(1, 2) for part in (q_BTEF, k_BUEF, v_BUEF))
        attended_BETF = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        return attended_BETF.transpose(1, 2)
    K, B = q_BTEF.shape[:2]
    if B > 1 and where is not None and where.ndim == 3:
        # The carry-ons share the mask: K joins the axis of heads.
        q, k, v = (part.movedim(0, 2).flatten(2, 3) for part in (q_BTEF, k_BUEF, v_BUEF))
        return attend(q, k, v, where).unflatten(2, (K, -1)).movedim(2, 0)
    q, k, v = (part.flatten(0, 1) for part in (q_BTEF, k_BUEF, v_BUEF))
    mask = where.flatten(0, -3) if where is not None else None
    return attend(q, k, v, mask).unflatten(0, (K, B))


def _over_spans(q_BTEF: Tensor, k_BTEF: Tensor, v_BTEF: Tensor, spans: Spans) -> Tensor:
    """Attend over one row, or over the rows of a stack as if they were one."""
    q, k, v = (part.flatten(0, -3) for part in (q_BTEF, k_BTEF, v_BTEF))
    T = q_BTEF.shape[-3]
    rows = len(q) // T
    cu_seqlens_KM = spans.cu_seqlens_M.expand(rows, -1)
    max_rows = max(1, MAX_SPANS // cu_seqlens_KM.shape[1])
    if rows > max_rows:
        parts = [x.split(max_rows) for x in (q_BTEF, k_BTEF, v_BTEF, cu_seqlens_KM)]
        return torch.cat(
            [
                _over_spans(q, k, v, Spans(cu_seqlens, spans.longest))
                for q, k, v, cu_seqlens in zip(*parts, strict=True)
            ]
        )
    cu_seqlens_M = cu_seqlens_KM[0]
    if rows > 1:
        first_K1 = (
            T * torch.arange(rows, device=cu_seqlens_M.device, dtype=cu_seqlens_M.dtype)[:, None]
        )
        cu_seqlens_M = (cu_seqlens_KM + first_K1).flatten()
    return _varlen(q, k, v, cu_seqlens_M, spans.longest).view(q_BTEF.shape)


def _varlen(
    q_TEF: Tensor, k_TEF: Tensor, v_TEF: Tensor, cu_seqlens_M: Tensor, longest: int
) -> Tensor:
    if q_TEF.device.type != "cpu":
        attended = varlen_attn(
            q_TEF, k_TEF, v_TEF, cu_seqlens_M, cu_seqlens_M, longest, longest, window_size=(-1, 0)
        )
        return cast("Tensor", attended)
    # On a CPU, for tests: one sequence after the other.
    lengths = cu_seqlens_M.diff().tolist()
    spans = zip(*(x[None].split(lengths, dim=1) for x in (q_TEF, k_TEF, v_TEF)), strict=True)
    return torch.cat([attend(q, k, v, None)[0] for q, k, v in spans if q.numel()])


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return mask_(K)BTU: causal, and never across segments; padding (-1) sees padding."""
    T = segments_BT.shape[-1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    small_BT = segments_BT.int()  # half as much to compare
    return causal & (small_BT[..., :, None] == small_BT[..., None, :])
