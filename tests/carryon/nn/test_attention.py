"""Attention over spans of one row against attention with the equivalent mask."""

from __future__ import annotations

import pytest
import torch

from embedcache.carryon.nn import attention
from embedcache.carryon.nn.attention import Spans, attend, segment_mask

E, T, HEAD_WIDTH = 2, 12, 8
STARTS = [[0, 3, 4, 9, 12, 12], [0, 5, 10, 12, 12, 12], [0, 1, 2, 3, 12, 12]]


def parts(*lead: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(*lead, 1, T, E, HEAD_WIDTH, generator=draw, requires_grad=True)
        for _ in range(3)
    ]


def segments(starts: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(starts) - 1), torch.tensor(starts).diff())[None]


@pytest.mark.parametrize(("lead", "starts"), [((), STARTS[0]), ((3,), STARTS[0]), ((3,), STARTS)])
@pytest.mark.parametrize("most", [attention.MAX_SPANS, 13, 1])
def test_spans_are_the_equivalent_mask(lead, starts, most, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SPANS", most)
    q, k, v = parts(*lead)
    spans = Spans(torch.tensor(starts, dtype=torch.int32), 9)
    many = isinstance(starts[0], list)
    mask = torch.stack([segment_mask(segments(row)) for row in starts]) if many else None
    mask = segment_mask(segments(starts)) if mask is None else mask
    found, expected = attend(q, k, v, spans), attend(q, k, v, mask)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for gradient, other in zip(
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, other)
    everything = attend(q, k, v, None)
    assert not torch.allclose(found, everything)


@pytest.mark.gpu
@pytest.mark.parametrize("each_its_own", [True, False])
def test_over_spans_a_nan_stays_in_its_carry_on(each_its_own):
    draw = torch.Generator("cuda").manual_seed(0)
    clean = [
        torch.randn(3, 1, 101, 2, 32, generator=draw, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    ]
    spoilt = [part.clone() for part in clean]
    for part in spoilt:
        part[1] = torch.nan
    starts = torch.tensor([0, 37, 98, 101], dtype=torch.int32, device="cuda")
    spans = Spans(starts.expand(3, -1).contiguous() if each_its_own else starts, 64)
    results = []
    for *parts, upstream in (clean, spoilt):
        attended = attend(*(part.requires_grad_() for part in parts), spans)
        results.append([attended, *torch.autograd.grad(attended, parts, upstream)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        assert found[1].isnan().all()
