"""A softmax of a single tile, where the problems of `test_exact` do not reach."""

from __future__ import annotations

import pytest
import torch
from support.loss_problems import difference, problem, reference

from embedcache.loss import linear_cross_entropy, one_tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_whose_probability_underflows_keep_their_loss(dtype):
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


def test_a_label_outside_the_columns_has_a_loss_of_nan():
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
    for size in (one_tile.BLOCK_BYTES, 4 * 101 * 3):
        monkeypatch.setattr(one_tile, "BLOCK_BYTES", size)
        x, head, targets = problem("plain", 64, 101, 16, torch.bfloat16)
        loss = linear_cross_entropy(x, head, targets)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
