"""Causal attention for a CPU's bfloat16 products: blocks of queries, whose probabilities are kept.

PyTorch's own computes the probabilities again for the gradient. Kept, attention and its gradient
take 0.85 of that time over rows of 1,024, and half of it where a mask tells sequences apart (two
cores with AVX512-BF16, two rows of one head of 64).

Axes: B batch, N heads, T time, S time of keys, D head width, G of B and N; R queries of a block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Queries of a block: it sees no key after its last query, so with fewer, less is computed for
nothing; with many fewer, products are too small to be fast."""
LONGEST = 2048
"""Tokens of a row, at most: of longer ones the probabilities would be more than all else."""


def fits(q_BTND: Tensor, k_BSND: Tensor) -> bool:
    """Say whether attention is left to `attend_blockwise`: of bfloat16, on a CPU, of whole rows."""
    alike = q_BTND.device.type == "cpu" and q_BTND.dtype == torch.bfloat16
    return alike and 1 < q_BTND.shape[1] == k_BSND.shape[1] <= LONGEST


def attend_blockwise(
    q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, mask_BTS: Tensor | None
) -> Tensor:
    """Return attended_BTND, causal; ``mask_BTS``, where there is one, is causal, too."""
    apply: Any = _Blockwise.apply  # torch leaves it untyped
    attended_BTND: Tensor = apply(q_BTND, k_BTND, v_BTND, mask_BTS)
    return attended_BTND


class _Blockwise(torch.autograd.Function):
    """Each block's parts lie close, and are kept so: a product of several would copy them first."""

    @staticmethod
    def forward(
        ctx: Any, q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        q_GTD, k_GTD, v_GTD = (_grouped(part) for part in (q_BTND, k_BTND, v_BTND))
        q_GTD = q_GTD * q_GTD.shape[-1] ** -0.5
        attended, kept = [], []
        with torch.autocast("cpu", enabled=False):
            for rows in _blocks(q_GTD.shape[1]):
                q_GRD = q_GTD[:, rows].contiguous()
                k_GSD, v_GSD = (part[:, : rows.stop].contiguous() for part in (k_GTD, v_GTD))
                score_GRS = torch.bmm(q_GRD, k_GSD.mT)
                _hide(score_GRS, rows, mask_BTS)
                chance_GRS = torch.softmax(score_GRS, dim=-1)
                attended.append(torch.bmm(chance_GRS, v_GSD))
                kept += [q_GRD, k_GSD, v_GSD, chance_GRS]
        ctx.save_for_backward(*kept)
        return _ungrouped(torch.cat(attended, dim=1), len(q_BTND))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        B, g_GTD, kept = len(gradients[0]), _grouped(gradients[0]), ctx.saved_tensors
        q_gradients, sums = list[Tensor](), list[Tensor]()
        for index, rows in reversed([*enumerate(_blocks(g_GTD.shape[1]))]):
            q_GRD, k_GSD, v_GSD, chance_GRS = kept[4 * index : 4 * index + 4]
            g_GRD = g_GTD[:, rows].contiguous()
            upstream_GRS = torch.bmm(g_GRD, v_GSD.mT)
            score_GRS = torch._softmax_backward_data(upstream_GRS, chance_GRS, -1, g_GRD.dtype)
            q_gradients.insert(0, torch.bmm(score_GRS, k_GSD))
            both = torch.bmm(score_GRS.mT, q_GRD), torch.bmm(chance_GRS.mT, g_GRD)
            if not sums:  # the last block sees all keys; sums over blocks are kept wide
                sums = [part_GSD.float() for part_GSD in both]
                continue
            for sum_GTD, part_GSD in zip(sums, both, strict=True):
                sum_GTD[:, : rows.stop].add_(part_GSD)
        of_q_GTD = torch.cat(q_gradients, dim=1).mul_(g_GTD.shape[-1] ** -0.5)
        found = (of_q_GTD, *(sum_GTD.to(g_GTD.dtype) for sum_GTD in sums))
        return *(_ungrouped(part_GTD, B) for part_GTD in found), None


def _grouped(x_BTND: Tensor) -> Tensor:
    """Return the heads of all rows, one behind the other, _GTD."""
    B, T, N, D = x_BTND.shape
    return x_BTND.transpose(1, 2).reshape(B * N, T, D)


def _ungrouped(x_GTD: Tensor, B: int) -> Tensor:
    """Return, _BTND, what `_grouped` was given."""
    return x_GTD.unflatten(0, (B, -1)).transpose(1, 2)


def _blocks(T: int) -> list[slice]:
    return [slice(start, min(start + ROWS, T)) for start in range(0, T, ROWS)]


@lru_cache(maxsize=64)
def _causal(R: int, dtype: torch.dtype) -> Tensor:
    return torch.full((R, R), -torch.inf, dtype=dtype).triu_(1)


def _hide(score_GRS: Tensor, rows: slice, mask_BTS: Tensor | None) -> None:
    """Leave only what the queries of a block may see."""
    if mask_BTS is None:
        score_GRS[:, :, rows].add_(_causal(rows.stop - rows.start, score_GRS.dtype))
        return
    seen, hidden = score_GRS.new_tensor([0.0, -torch.inf])
    bias_BRS = torch.where(mask_BTS[:, rows, : rows.stop], seen, hidden)
    score_GRS.unflatten(0, (len(bias_BRS), -1)).add_(bias_BRS[:, None])
