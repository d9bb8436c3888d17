"""The softmax of a tile that is all of it, where `test_exact`'s problems do not reach."""

from __future__ import annotations

import pytest
import torch
from support.loss_problems import difference, problem, reference

from embedcache.loss import linear_cross_entropy
from embedcache.loss import one_tile as whole
from embedcache.loss import tile_update as absorb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_that_are_all_but_impossible_keep_their_loss(dtype):
    """Their probability is less than any float32 above 0."""
    x, head, targets = problem("scale", 64, 101, 16, torch.float32)
    x = (x.detach() * 300).to(dtype).requires_grad_()
    head.weight_VH.data = head.weight_VH.data.to(dtype)
    upstream = torch.rand(64, generator=torch.Generator().manual_seed(1))
    found = linear_cross_entropy(x, head, targets)
    (found * upstream).sum().backward()
    expected, gradient = reference(x, head, targets, upstream)
    assert expected.max() > 300
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-3)
    assert difference(x.grad, gradient) < 2e-2


def test_a_label_that_no_column_is_has_no_loss():
    x, head, targets = problem("plain", 64, 101, 16, torch.float32)
    expected = linear_cross_entropy(x, head, targets).detach()
    outside = targets.clone()
    outside[[3, 40]] = torch.tensor([101, -1])
    found = linear_cross_entropy(x, head, outside)
    assert found[[3, 40]].isnan().all()
    inside = outside == targets
    assert torch.equal(found[inside], expected[inside])


def test_blocks_give_the_same_bits(monkeypatch):
    results = []
    for size in (whole.BLOCK_BYTES, 4 * 101 * 3):
        monkeypatch.setattr(whole, "BLOCK_BYTES", size)
        x, head, targets = problem("plain", 64, 101, 16, torch.bfloat16)
        loss = linear_cross_entropy(x, head, targets)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("runs", [absorb.RUNS, 1])
def test_factors_that_are_equal_side_by_side_give_the_same_bits(runs, monkeypatch):
    monkeypatch.setattr(absorb, "RUNS", runs)
    draw = torch.Generator().manual_seed(0)
    sums = torch.randn(40, 16, generator=draw).bfloat16()
    factors = torch.tensor([0.0, 1 / 37, 1 / 37, 0.0]).repeat_interleave(10)
    out = torch.empty_like(sums)
    absorb.combine(sums, factors, out=out)
    assert torch.equal(out, (sums.float() * factors[:, None]).bfloat16())
