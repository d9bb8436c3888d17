"""The frozen-head loss against `F.cross_entropy` on all logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from embedcache import loss as loss_module
from embedcache.base.head import Head
from embedcache.loss import Shortlist, cross_entropy, row_chunks, tail_proposal

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "divisor": {"logit_divisor": 8.0},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
}
SHAPES = [(1, 3, 2), (7, 33, 5), (64, 101, 16)]  # N, V, H


def problem(kind: str, N: int, V: int, H: int) -> tuple[torch.Tensor, Head, torch.Tensor]:
    draw = torch.Generator().manual_seed(N)
    settings = dict(HEADS[kind])
    bias = torch.randn(V, generator=draw) if settings.pop("bias", False) else None
    weight = torch.randn(V, H, generator=draw).requires_grad_()
    x = torch.randn(N, H, generator=draw).requires_grad_()
    head = Head(weight, bias, **settings)
    return x, head, torch.randint(V, (N,), generator=draw)


def reference_logits(x: torch.Tensor, head: Head) -> torch.Tensor:
    logits = x.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 10_000])
def test_exact_values_and_gradients(kind, shape, rows, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", rows * 4 * shape[1])
    x, head, targets = problem(kind, *shape)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    found = cross_entropy(x, head, targets)
    (found * upstream).sum().backward()

    other = x.detach().clone().requires_grad_()
    expected = F.cross_entropy(reference_logits(other, head), targets, reduction="none")
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_never_takes_a_gradient(kind):
    x, head, targets = problem(kind, 7, 33, 5)
    for frozen in (head.weight_VH, head.bias_V):
        if frozen is not None:
            frozen.requires_grad_()
    shortlist = Shortlist(head, tail_proposal(x.detach(), head), samples=5)
    (
        cross_entropy(x, head, targets).sum()
        + shortlist.cross_entropy(x[None], targets, step=0).sum()
    ).backward()
    assert x.grad is not None
    assert head.weight_VH.grad is None
    assert head.bias_V is None or head.bias_V.grad is None


def test_bfloat16_is_within_its_rounding():
    x, head, targets = problem("softcap", 64, 101, 16)
    low = x.detach().bfloat16().requires_grad_()
    half = Head(head.weight_VH.bfloat16(), softcap=head.softcap)
    found = cross_entropy(low, half, targets)
    expected = F.cross_entropy(reference_logits(low.detach(), half), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=5e-2)
    found.mean().backward()
    assert low.grad.dtype == torch.bfloat16


def test_no_rows_is_no_loss():
    x, head, targets = problem("plain", 7, 33, 5)
    assert cross_entropy(x[:0], head, targets[:0]).shape == (0,)


def test_without_a_gradient_none_is_kept():
    x, head, targets = problem("plain", 7, 33, 5)
    assert not cross_entropy(x.detach(), head, targets).requires_grad


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (10, 3), (9, 3), (2, 100)])
def test_row_chunks_cover_every_row_once(rows, size, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", size * 4 * 7)
    chunks = row_chunks(rows, 7, torch.device("cpu"))
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    assert all(chunk.stop - chunk.start <= size for chunk in chunks)


def proposal(V: int) -> torch.Tensor:
    """A proposal that knows nothing of a problem, so that tests hold for any."""
    q_V = torch.rand(V, generator=torch.Generator().manual_seed(8)) + 0.1
    return q_V / q_V.sum()


@pytest.mark.parametrize("kind", HEADS)
def test_a_shortlist_of_everything_is_exact(kind):
    x, head, targets = problem(kind, 64, 101, 16)
    shortlist = Shortlist(head, proposal(101), samples=100_000)
    full = shortlist.cross_entropy(x[None], targets, step=3)[0]
    full.sum().backward()
    other = x.detach().clone().requires_grad_()
    exact = cross_entropy(other, head, targets)
    exact.sum().backward()
    torch.testing.assert_close(full, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_shortlist_values_and_gradients(kind, monkeypatch):
    """Of three carry-ons that see the same positions, in lists of four positions."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 3 * 4 * 40)
    monkeypatch.setitem(loss_module.SHORTLIST_ROWS, "cpu", 4)
    N, V, samples = 7, 101, 10
    x, head, targets = problem(kind, N, V, 16)
    x_GNH = torch.stack([x.detach() * scale for scale in (1, 0.5, -1)]).requires_grad_()
    q_V = proposal(V)
    shortlist = Shortlist(head, q_V, samples=samples, seed=4)
    found = shortlist.cross_entropy(x_GNH, targets, step=9)
    found.sum().backward()

    draw = torch.Generator().manual_seed(4 * 1_000_003 + 9)
    other = x_GNH.detach().clone().requires_grad_()
    expected = []
    for rows in (slice(0, 4), slice(4, 7)):
        columns, index_V = shortlist.columns(targets[rows], draw)
        # Which tokens they are is read from their rows of the head: all differ.
        chosen = (columns.weight_CH[:, None] == head.weight_VH).all(-1).float().argmax(dim=1)
        labels = set(targets[rows].tolist())
        assert labels <= set(chosen.tolist())
        assert torch.equal(index_V[chosen], torch.arange(len(chosen)))
        rest = 1 - float(q_V[list(labels)].sum())
        chance = [
            1.0 if token in labels else min(1.0, samples * float(q_V[token]) / rest)
            for token in chosen.tolist()
        ]
        logits = torch.stack([reference_logits(part[rows], head) for part in other])
        total = (logits[..., chosen].exp() / torch.tensor(chance).double()).sum(dim=-1)
        wanted = logits.gather(2, targets[rows].expand(3, -1)[..., None])[..., 0]
        expected.append(total.log() - wanted)
    expected = torch.cat(expected, dim=1)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_GNH.grad, other.grad, rtol=1e-4, atol=1e-5)


def estimates(x: torch.Tensor, head: Head, targets: torch.Tensor, q_V: torch.Tensor):
    """The sums that losses are logarithms of, over many draws, and the exact ones."""
    shortlist = Shortlist(head, q_V, samples=10)
    draws = torch.stack(
        [shortlist.cross_entropy(x[None], targets, step=s)[0].double().exp() for s in range(800)]
    )
    return draws, cross_entropy(x, head, targets).double().exp()


def test_the_estimated_sum_is_unbiased():
    x, head, targets = problem("plain", 7, 101, 16)
    x = x.detach() / 2
    draws, exact = estimates(x, head, targets, proposal(101))
    error = (draws.mean(dim=0) - exact) / (draws.std(dim=0) / len(draws) ** 0.5)
    assert error.abs().max() < 4.5
    assert (draws.std(dim=0) / exact).min() > 0.01  # there was something to average out


def test_a_proposal_of_the_head_s_own_varies_less():
    x, plain, targets = problem("plain", 64, 101, 16)
    x = x.detach() / 4
    bias = torch.linspace(0, -8, 101)[
        torch.randperm(101, generator=torch.Generator().manual_seed(3))
    ]
    head = Head(plain.weight_VH.detach(), bias)
    q_V = tail_proposal(x, head)
    square_V = torch.softmax(reference_logits(x, head), dim=1).square().mean(dim=0)
    steered_V = square_V**loss_module.FLATTENED
    expected = 0.9 * steered_V / steered_V.sum() + 0.1 / 101
    torch.testing.assert_close(q_V.double(), expected, rtol=1e-5, atol=1e-9)
    (steered, exact), (flat, _) = (
        estimates(x[:5], head, targets[:5], q) for q in (q_V, torch.full((101,), 1 / 101))
    )
    assert (steered / exact).std(dim=0).mean() < 0.6 * (flat / exact).std(dim=0).mean()


def test_draws_depend_on_seed_and_step_only():
    x, head, targets = problem("plain", 7, 101, 16)

    def loss(seed: int, step: int) -> torch.Tensor:
        shortlist = Shortlist(head, proposal(101), samples=10, seed=seed)
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
