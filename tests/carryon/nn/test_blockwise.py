"""Blockwise attention in bfloat16 against attention in float64."""

from __future__ import annotations

import pytest
import torch

from embedcache.carryon.nn import blockwise
from embedcache.carryon.nn.attention import attend, segment_mask

B, N, D = 2, 2, 8


def parts(T: int, *lead: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, B, T, N, D, generator=draw).to(dtype) for _ in range(4)]


def results(tensors: list[torch.Tensor], where: torch.Tensor | None) -> list[torch.Tensor]:
    *qkv, upstream = tensors
    qkv = [part.clone().requires_grad_() for part in qkv]
    attended = attend(*qkv, where)
    return [attended.detach(), *torch.autograd.grad(attended, qkv, upstream)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("T", "lead"), [(12, ()), (11, ()), (4, ()), (11, (3,))])
def test_values_and_gradients(T, lead, packed, monkeypatch):
    """In blocks of four queries, the last one smaller."""
    monkeypatch.setattr(blockwise, "ROWS", 4)
    tensors = parts(T, *lead)
    segments = torch.tensor([[0] * 2 + [1] * (T - 2), [2] * (T - 1) + [-1]])
    mask = segment_mask(segments) if packed else None
    found = results(tensors, mask)
    expected = results([part.double() for part in tensors], mask)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.01, error


def test_only_bfloat16_of_whole_rows_is_left_to_it(monkeypatch):
    q, k, *_ = parts(6)
    assert blockwise.fits(q, k)
    assert not blockwise.fits(q[:, :1], k)
    assert not blockwise.fits(q.float(), k.float())
    monkeypatch.setattr(blockwise, "LONGEST", 5)
    assert not blockwise.fits(q, k)


def test_one_of_a_stack_is_what_it_is_alone():
    """Also beside one that is no number."""
    T = 2 * blockwise.ROWS + 3
    alone = parts(T)
    stacked = [torch.stack([part, torch.full_like(part, torch.nan), -part]) for part in alone]
    for found, expected in zip(results(stacked, None), results(alone, None), strict=True):
        assert torch.equal(found[0], expected)
        assert found[1].isnan().all()
