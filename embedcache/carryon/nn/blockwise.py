"""Masked causal attention in bfloat16 on a CPU, computed in blocks of queries.

PyTorch's attention computes the probabilities a second time for the gradient. Here they are saved
for the backward pass. With a mask that separates sequences, attention and its gradient then take
0.4 to 0.8 of PyTorch's time (one core with AMX; rows of 128 to 2,048 tokens).

Axes: B rows of a batch, T time, U keys, E heads, of all rows where there is no B, F width of a
head; t queries of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Queries of a block. A block skips the keys after its last query. Smaller blocks compute fewer
masked scores, but much smaller products are slow."""
MAX_TOKENS = 2048
"""Most tokens of a row: in longer rows the probabilities would take more memory than everything
else."""


def applies(q_BTEF: Tensor, k_BUEF: Tensor) -> bool:
    """Return whether `attend_blockwise` is faster than PyTorch on these inputs, with a mask."""
    supported = q_BTEF.device.type == "cpu" and q_BTEF.dtype == torch.bfloat16
    return supported and 1 < q_BTEF.shape[1] == k_BUEF.shape[1] <= MAX_TOKENS


def attend_blockwise(q_BTEF: Tensor, k_BTEF: Tensor, v_BTEF: Tensor, mask_BTU: Tensor) -> Tensor:
    """Return attended_BTEF; ``mask_BTU`` is causal."""
    apply: Any = _Blockwise.apply  # torch leaves it untyped
    attended_BTEF: Tensor = apply(q_BTEF, k_BTEF, v_BTEF, mask_BTU)
    return attended_BTEF


class _Blockwise(torch.autograd.Function):
    """Saves each block's tensors contiguously, because products would copy them otherwise."""

    @staticmethod
    def forward(
        ctx: Any, q_BTEF: Tensor, k_BTEF: Tensor, v_BTEF: Tensor, mask_BTU: Tensor
    ) -> Tensor:
        q_ETF, k_ETF, v_ETF = (_heads_first(part) for part in (q_BTEF, k_BTEF, v_BTEF))
        q_ETF = q_ETF * q_ETF.shape[-1] ** -0.5
        attended, saved = [], []
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(q_ETF.shape[1]):
                q_EtF = q_ETF[:, block].contiguous()
                k_EUF, v_EUF = (part[:, : block.stop].contiguous() for part in (k_ETF, v_ETF))
                score_EtU = torch.bmm(q_EtF, k_EUF.mT)
                _mask(score_EtU, block, mask_BTU)
                probability_EtU = torch.softmax(score_EtU, dim=-1)
                attended.append(torch.bmm(probability_EtU, v_EUF))
                saved += [q_EtF, k_EUF, v_EUF, probability_EtU]
        ctx.save_for_backward(*saved)
        return _rows_first(torch.cat(attended, dim=1), len(q_BTEF))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        B, grad_ETF, saved = len(gradients[0]), _heads_first(gradients[0]), ctx.saved_tensors
        grad_q, grad_kv = list[Tensor](), list[Tensor]()
        for index, block in reversed([*enumerate(_blocks(grad_ETF.shape[1]))]):
            q_EtF, k_EUF, v_EUF, probability_EtU = saved[4 * index : 4 * index + 4]
            grad_EtF = grad_ETF[:, block].contiguous()
            grad_probability_EtU = torch.bmm(grad_EtF, v_EUF.mT)
            grad_score_EtU = torch._softmax_backward_data(
                grad_probability_EtU, probability_EtU, -1, grad_EtF.dtype
            )
            grad_q.insert(0, torch.bmm(grad_score_EtU, k_EUF))
            parts = (
                torch.bmm(grad_score_EtU.mT, q_EtF),
                torch.bmm(probability_EtU.mT, grad_EtF),
            )
            if not grad_kv:  # the last block sees all keys; sums over blocks are float32
                grad_kv = [part_EUF.float() for part_EUF in parts]
                continue
            for sum_ETF, part_EUF in zip(grad_kv, parts, strict=True):
                sum_ETF[:, : block.stop].add_(part_EUF)
        grad_q_ETF = torch.cat(grad_q, dim=1).mul_(grad_ETF.shape[-1] ** -0.5)
        found = (grad_q_ETF, *(sum_ETF.to(grad_ETF.dtype) for sum_ETF in grad_kv))
        return *(_rows_first(part_ETF, B) for part_ETF in found), None


def _heads_first(x_BTEF: Tensor) -> Tensor:
    """Return the heads of all rows, one behind the other, x_ETF."""
    B, T, E, width = x_BTEF.shape
    return x_BTEF.transpose(1, 2).reshape(B * E, T, width)


def _rows_first(x_ETF: Tensor, B: int) -> Tensor:
    """Return x_BTEF, the inverse of `_heads_first`."""
    return x_ETF.unflatten(0, (B, -1)).transpose(1, 2)


def _blocks(T: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _mask(score_EtU: Tensor, block: slice, mask_BTU: Tensor) -> None:
    """Set the scores of masked keys to -inf, in place."""
    visible, hidden = score_EtU.new_tensor([0.0, -torch.inf])
    bias_BtU = torch.where(mask_BTU[:, block, : block.stop], visible, hidden)
    score_EtU.unflatten(0, (len(bias_BtU), -1)).add_(bias_BtU[:, None])
