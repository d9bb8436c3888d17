"""The shortlist's loss against the sums that it estimates, in float64."""

from __future__ import annotations

import pytest
import torch
from support.loss_problems import HEADS, problem, reference_logits

from embedcache.base.head import Head
from embedcache.loss import ShortlistSampler, chunks, linear_cross_entropy, tail_proposal
from embedcache.loss.shortlist import sampler
from embedcache.loss.shortlist.sampler import distinct
from embedcache.loss.shortlist.tail_proposal import POWER, POWER_BESIDE_TOP_IDS


def proposal(V: int) -> torch.Tensor:
    """A random proposal, independent of the problem: tests hold for any proposal."""
    q_V = torch.rand(V, generator=torch.Generator().manual_seed(8)) + 0.1
    return q_V / q_V.sum()


@pytest.mark.parametrize("kind", HEADS)
def test_a_shortlist_of_everything_is_exact(kind):
    x, head, targets = problem(kind, 64, 101, 16)
    shortlist = ShortlistSampler(head, proposal(101), samples=100_000)
    full = shortlist.cross_entropy(x[None], targets, step=3)[0]
    full.sum().backward()
    other = x.detach().clone().requires_grad_()
    exact = linear_cross_entropy(other, head, targets)
    exact.sum().backward()
    torch.testing.assert_close(full, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_shortlist_values_and_gradients(kind, monkeypatch):
    """For three carry-ons that share a batch, in shortlists of four positions."""
    for name, value in {
        "FULL_ROWS": 3,
        "ALIGNMENT": 1,
        "default_budget": lambda device: 3 * 4 * 8,
    }.items():
        monkeypatch.setattr(chunks, name, value)
    monkeypatch.setitem(sampler.POSITIONS, "cpu", 4)
    N, V, samples = 7, 101, 10
    x, head, targets = problem(kind, N, V, 16)
    x_GNH = torch.stack([x.detach() * scale for scale in (1, 0.5, -1)]).requires_grad_()
    q_V = proposal(V)
    shortlist = ShortlistSampler(head, q_V, samples=samples, seed=4)
    found = shortlist.cross_entropy(x_GNH, targets, step=9)
    found.sum().backward()

    draw = torch.Generator().manual_seed(4 * 1_000_003 + 9)
    other = x_GNH.detach().clone().requires_grad_()
    expected = []
    for rows in (slice(0, 4), slice(4, 7)):
        columns, ids = shortlist.columns(targets[rows], draw)
        # Rows of the head all differ: they tell which tokens were chosen.
        chosen = (columns.weight_CH[:, None] == head.weight_VH).all(-1).float().argmax(dim=1)
        real = columns.log_weight_C.isfinite()
        assert len(chosen) % sampler.COLUMN_MULTIPLE["cpu"] == 0
        assert not real[chosen.new_tensor(range(int(real.sum()), len(chosen)))].any()
        chosen = chosen[real]
        labels = set(targets[rows].tolist())
        assert ids.tolist() == sorted(labels) == chosen[: len(ids)].tolist()
        rest = 1 - float(q_V[list(labels)].sum())
        inclusion = [
            1.0 if token in labels else min(1.0, samples * float(q_V[token]) / rest)
            for token in chosen.tolist()
        ]
        logits = torch.stack([reference_logits(part[rows], head) for part in other])
        total = (logits[..., chosen].exp() / torch.tensor(inclusion).double()).sum(dim=-1)
        label = logits.gather(2, targets[rows].expand(3, -1)[..., None])[..., 0]
        expected.append(total.log() - label)
    expected = torch.cat(expected, dim=1)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_GNH.grad, other.grad, rtol=1e-4, atol=1e-5)


def estimates(x: torch.Tensor, head: Head, targets: torch.Tensor, q_V: torch.Tensor):
    """The exponentials of estimated losses, over many draws, and of the exact losses."""
    shortlist = ShortlistSampler(head, q_V, samples=10)
    draws = torch.stack(
        [shortlist.cross_entropy(x[None], targets, step=s)[0].double().exp() for s in range(400)]
    )
    return draws, linear_cross_entropy(x, head, targets).double().exp()


def test_the_estimated_sum_is_unbiased():
    x, head, targets = problem("plain", 7, 101, 16)
    x = x.detach() / 2
    draws, exact = estimates(x, head, targets, proposal(101))
    error = (draws.mean(dim=0) - exact) / (draws.std(dim=0) / len(draws) ** 0.5)
    assert error.abs().max() < 4.5
    assert (draws.std(dim=0) / exact).min() > 0.01  # there was something to average out


def test_the_tail_proposal_has_less_variance_than_a_uniform_one():
    x, plain, targets = problem("plain", 64, 101, 16)
    x = x.detach() / 4
    bias = torch.linspace(0, -8, 101)[
        torch.randperm(101, generator=torch.Generator().manual_seed(3))
    ]
    head = Head(plain.weight_VH.detach(), bias)
    q_V = tail_proposal(x, head)
    square_V = torch.softmax(reference_logits(x, head), dim=1).square().mean(dim=0)
    weight_V = square_V**POWER
    expected = 0.9 * weight_V / weight_V.sum() + 0.1 / 101
    torch.testing.assert_close(q_V.double(), expected, rtol=1e-5, atol=1e-9)
    (proposed, exact), (uniform, _) = (
        estimates(x[:5], head, targets[:5], q) for q in (q_V, torch.full((101,), 1 / 101))
    )
    assert (proposed / exact).std(dim=0).mean() < 0.6 * (uniform / exact).std(dim=0).mean()


def test_beside_top_ids_the_proposal_is_made_of_smaller_probabilities():
    x, head, _ = problem("plain", 64, 101, 16)
    x = x.detach()
    probability_NV = torch.softmax(reference_logits(x, head), dim=1)
    mean_V = torch.where(probability_NV < 0.05, probability_NV, 0).mean(dim=0)
    assert 0.05 < float(mean_V.sum()) < 0.95
    weight_V = mean_V**POWER_BESIDE_TOP_IDS
    expected = 0.9 * weight_V / weight_V.sum() + 0.1 / 101
    found = tail_proposal(x, head, held=0.05)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("held", [[0], [100], [0, 1, 2, 50, 99, 100], [*range(0, 101, 2)]])
def test_draws_are_those_of_a_line_without_the_held_intervals(held):
    _, head, _ = problem("plain", 7, 101, 16)
    q_V = proposal(101)
    shortlist = ShortlistSampler(head, q_V, samples=10)
    end_V = q_V.double().index_fill(0, torch.tensor(held), 0).cumsum(0)
    several = set()
    for step in range(50):
        columns, ids = shortlist.columns(torch.tensor([*held, *held]), shortlist.generator(step))
        assert ids.tolist() == held
        start = torch.rand(1, generator=shortlist.generator(step), dtype=torch.float64)
        expected = torch.searchsorted(end_V, (torch.arange(10) + start) * end_V[-1] / 10)
        chosen = (columns.weight_CH[:, None] == head.weight_VH).all(-1).float().argmax(dim=1)
        chosen = chosen[columns.log_weight_C.isfinite()]
        assert chosen.tolist() == [*held, *expected.unique().tolist()]
        several.add(tuple(chosen.tolist()))
    assert len(several) > 10


@pytest.mark.parametrize("ids", [[5], [0, 7, 7, 0], [7, 3, 3, 1]])
def test_distinct_ids_are_ascending(ids):
    ids = torch.tensor(ids)
    assert torch.equal(distinct(ids, 8), torch.unique(ids))


def test_a_point_at_the_end_of_the_line_draws_no_token_twice(monkeypatch):
    """Rounded sums may put a point there."""
    _, head, _ = problem("plain", 7, 101, 16)
    ones = torch.ones(1, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *given, **more: ones)
    shortlist = ShortlistSampler(head, torch.full((101,), 1 / 101), samples=10)
    columns, _ = shortlist.columns(torch.tensor([3, 100]), torch.Generator())
    real = columns.weight_CH[columns.log_weight_C.isfinite()]
    assert len(real.unique(dim=0)) == len(real) > 9


def test_draws_depend_on_seed_and_step_only():
    x, head, targets = problem("plain", 7, 101, 16)

    def loss(seed: int, step: int) -> torch.Tensor:
        shortlist = ShortlistSampler(head, proposal(101), samples=10, seed=seed)
        return shortlist.cross_entropy(x.detach()[None], targets, step=step)

    first = loss(1, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, loss(1, 5))
    assert not torch.equal(first, loss(1, 6))
    assert not torch.equal(first, loss(2, 5))
    state = torch.get_rng_state()
    loss(1, 5)
    assert torch.equal(state, torch.get_rng_state())
