"""Blockwise attention in bfloat16 against attention in float64."""

from __future__ import annotations

import pytest
import torch

from embedcache.carryon.nn import blockwise
from embedcache.carryon.nn.attention import attend, segment_mask

B, E, HEAD_WIDTH = 2, 2, 8


def parts(T: int, *lead: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, B, T, E, HEAD_WIDTH, generator=draw).to(dtype) for _ in range(4)]


def results(tensors: list[torch.Tensor], where: torch.Tensor) -> list[torch.Tensor]:
    *qkv, upstream = tensors
    qkv = [part.clone().requires_grad_() for part in qkv]
    attended = attend(*qkv, where)
    return [attended.detach(), *torch.autograd.grad(attended, qkv, upstream)]


@pytest.mark.parametrize(("T", "lead"), [(12, ()), (11, ()), (4, ()), (11, (3,))])
def test_values_and_gradients(T, lead, monkeypatch):
    """In blocks of four queries, the last one smaller."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    tensors = parts(T, *lead)
    segments = torch.tensor([[0] * 2 + [1] * (T - 2), [2] * (T - 1) + [-1]])
    mask = segment_mask(segments)
    found = results(tensors, mask)
    expected = results([part.double() for part in tensors], mask)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.01, error


def test_it_applies_to_bfloat16_of_whole_rows(monkeypatch):
    q, k, *_ = parts(6)
    assert blockwise.applies(q, k)
    assert not blockwise.applies(q[:, :1], k)
    assert not blockwise.applies(q.float(), k.float())
    monkeypatch.setattr(blockwise, "MAX_TOKENS", 5)
    assert not blockwise.applies(q, k)


def test_stacking_changes_nobody():
    """Not beside one that is NaN either."""
    T = 2 * blockwise.BLOCK + 3
    mask = segment_mask(torch.arange(T).expand(B, T) // 200)
    alone = parts(T)
    stacked = [torch.stack([part, torch.full_like(part, torch.nan), -part]) for part in alone]
    for found, expected in zip(results(stacked, mask), results(alone, mask), strict=True):
        assert torch.equal(found[0], expected)
        assert found[1].isnan().all()
