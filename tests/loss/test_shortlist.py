"""The shortlist's loss against the sums that it stands for, in float64."""

from __future__ import annotations

import pytest
import torch
from loss_problems import HEADS, problem, reference_logits

from embedcache.loss import Shortlist, chunks, cross_entropy, likeliest


@pytest.mark.parametrize("kind", HEADS)
def test_a_shortlist_of_everything_is_exact(kind):
    x, head, targets = problem(kind, 64, 101, 16)
    likely = likeliest(x.detach(), head, 8)
    full = Shortlist(head, samples=101).cross_entropy(x, targets, likely, step=3)
    full.sum().backward()
    other = x.detach().clone().requires_grad_()
    exact = cross_entropy(other, head, targets)
    exact.sum().backward()
    torch.testing.assert_close(full, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_shortlist_values_and_gradients(kind, monkeypatch):
    for name, value in {
        "FULL_ROWS": 3,
        "ALIGNMENT": 1,
        "default_budget": lambda device: 3 * 4 * 8,
    }.items():
        monkeypatch.setattr(chunks, name, value)
    N, V = 7, 101
    x, head, targets = problem(kind, N, V, 16)
    likely = likeliest(x.detach(), head, 2)
    shortlist = Shortlist(head, samples=10, seed=4)
    found = shortlist.cross_entropy(x, targets, likely, step=9)
    found.sum().backward()

    columns, _ = shortlist.columns(targets, likely, step=9)
    # Which tokens they are is read from their rows of the head: all differ.
    chosen = (columns.weight_CH[:, None] == head.weight_VH).all(-1).float().argmax(dim=1)
    listed = set(targets.tolist()) | set(likely.flatten().tolist())
    assert listed <= set(chosen.tolist())
    assert len(set(chosen.tolist())) == len(chosen) == len(listed) + 10
    weight = torch.tensor([1.0 if c in listed else (V - len(listed)) / 10 for c in chosen.tolist()])

    other = x.detach().clone().requires_grad_()
    logits = reference_logits(other, head)
    total = (logits[:, chosen].exp() * weight.double()).sum(dim=1)
    expected = total.log() - logits[torch.arange(N), targets]
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_estimated_sum_is_unbiased():
    x, head, targets = problem("plain", 7, 101, 16)
    x = x.detach() / 2
    likely = likeliest(x, head, 2)
    shortlist = Shortlist(head, samples=10)
    draws = torch.stack(
        [shortlist.cross_entropy(x, targets, likely, step=s).double().exp() for s in range(800)]
    )
    # exp(loss) is the sum over the label's own term, so its mean is exp of the exact loss.
    exact = cross_entropy(x, head, targets).double().exp()
    error = (draws.mean(dim=0) - exact) / (draws.std(dim=0) / len(draws) ** 0.5)
    assert error.abs().max() < 4.5
    assert (draws.std(dim=0) / exact).min() > 0.01  # there was something to average out


def test_draws_depend_on_seed_and_step_only():
    x, head, targets = problem("plain", 7, 101, 16)
    likely = likeliest(x.detach(), head, 2)

    def rows(seed: int, step: int) -> torch.Tensor:
        return (
            Shortlist(head, samples=10, seed=seed).columns(targets, likely, step=step)[0].weight_CH
        )

    first = rows(1, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, rows(1, 5))
    assert not torch.equal(first, rows(1, 6))
    assert not torch.equal(first, rows(2, 5))
    state = torch.get_rng_state()
    rows(1, 5)
    assert torch.equal(state, torch.get_rng_state())
