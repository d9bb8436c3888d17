"""The exact loss against `F.cross_entropy` on all logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loss_problems import HEADS, SHAPES, difference, problem, reference, reference_logits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from embedcache.base.head import Head
from embedcache.errors import UsageError
from embedcache.loss import (
    Chunks,
    ShortlistSampler,
    linear_cross_entropy,
    online_softmax,
    tail_proposal,
)

ALL = 10_000
CHUNKS = [(1, 9), (5, 40), (ALL, 2), (ALL, ALL)]  # rows and columns at a time
# Error of a loss in nats, and relative error of a gradient. A bfloat16 logit has 8 bits: near 16 it
# is off by up to 1/32, and so is a probability, relatively.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (6e-2, 2e-2),
}


def weights(N: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(kind, shape, chunks, dtype):
    x, head, targets = problem(kind, *shape, dtype)
    upstream = weights(shape[0])
    found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=chunks[0], columns=chunks[1]))
    (found * upstream).sum().backward()
    expected, gradient = reference(x, head, targets, upstream)
    nats, share = TOLERANCES[dtype]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=nats)
    assert difference(x.grad, gradient) <= share


@pytest.mark.parametrize("kind", HEADS)
def test_default_chunks_and_no_gradient_give_the_same(kind):
    x, head, targets = problem(kind, 64, 101, 16)
    found = linear_cross_entropy(x.detach(), head, targets)
    assert not found.requires_grad
    expected = reference(x, head, targets, weights(64))[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_copies_give_the_same_bits(dtype, monkeypatch):
    x, head, targets = problem("all", 64, 101, 16, dtype)
    results = []
    for rows in (100, 7):
        monkeypatch.setitem(online_softmax.BLOCK_BYTES, "cpu", rows * 4 * 30)
        loss = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=ALL, columns=30))
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_finite_differences():
    x, head, targets = problem("all", 7, 33, 5, torch.float64)
    chunks = Chunks(rows=3, columns=10)
    assert torch.autograd.gradcheck(
        lambda x: linear_cross_entropy(x, head, targets, chunks=chunks), x
    )


@pytest.mark.parametrize("chunks", [(ALL, ALL), (3, 30)])
def test_bfloat16_gradients_of_confident_positions(chunks):
    # p is 0.998 and more: p - 1 rounded beside the other terms would have an error of its own size
    _, head, targets = problem("plain", 64, 101, 64, torch.bfloat16)
    x = (head.weight_VH[targets] / 5).requires_grad_()
    found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=chunks[0], columns=chunks[1]))
    found.sum().backward()
    expected, gradient = reference(x, head, targets, torch.ones(64))
    assert expected.median() < 0.002
    each = (x.grad.double() - gradient).norm(dim=1) / gradient.norm(dim=1)
    assert each.max() < 0.06


def test_many_tiles_add_no_rounding_to_bfloat16_gradients():
    x, head, targets = problem("scale", 64, 2003, 16, torch.bfloat16)
    errors = []
    for columns in (ALL, 20):
        loss = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=ALL, columns=columns))
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        errors.append(difference(gradient, reference(x, head, targets, torch.ones(64))[1]))
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_never_takes_a_gradient(kind):
    x, head, targets = problem(kind, 7, 33, 5)
    for parameter in (head.weight_VH, head.bias_V):
        if parameter is not None:
            parameter.requires_grad_()
    shortlist = ShortlistSampler(head, tail_proposal(x.detach(), head), samples=5)
    (
        linear_cross_entropy(x, head, targets).sum()
        + shortlist.cross_entropy(x[None], targets, step=0).sum()
    ).backward()
    assert x.grad is not None
    assert head.weight_VH.grad is None
    assert head.bias_V is None or head.bias_V.grad is None


def test_a_tied_embedding_learns_from_its_inputs_only():
    torch.manual_seed(0)
    embedding = nn.Embedding(33, 5)
    ids, targets = torch.arange(7), torch.arange(7) + 3
    linear_cross_entropy(embedding(ids), Head(embedding.weight), targets).sum().backward()
    untied = nn.Embedding.from_pretrained(embedding.weight.detach().clone(), freeze=False)
    logits = reference_logits(untied(ids), Head(embedding.weight))
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad, untied.weight.grad)


def test_without_positions_there_is_no_loss():
    x, head, targets = problem("plain", 7, 33, 5)
    found = linear_cross_entropy(x[:0], head, targets[:0])
    assert found.shape == (0,)
    found.sum().backward()


def test_backward_twice_gives_the_same_twice():
    x, head, targets = problem("plain", 7, 33, 5)
    loss = linear_cross_entropy(x, head, targets).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


class Recorder(TorchDispatchMode):
    """Records the operations, and the elements of the largest tensor, of any dtype and float32."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.wide = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
            if result.dtype == torch.float32:
                self.wide = max(self.wide, result.numel())
        return result


def test_without_grad_mode_no_gradient_is_computed():
    x, head, targets = problem("plain", 7, 33, 5)
    with Recorder() as with_gradient:
        linear_cross_entropy(x, head, targets)
    with torch.no_grad(), Recorder() as without:
        linear_cross_entropy(x, head, targets)
    assert with_gradient.operations - without.operations >= {"expm1", "scatter_"}


def test_neither_all_logits_nor_a_float32_head_ever_exist():
    N, V, H = 60, 501, 64
    x, head, targets = problem("all", N, V, H, torch.bfloat16)
    with Recorder() as made:
        linear_cross_entropy(x, head, targets, chunks=Chunks(rows=10, columns=100)).sum().backward()
    assert 0 < made.elements <= N * H < V * H
    assert made.wide <= N * H


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(head_dtype, autocast):
    x, head, targets = problem("plain", 64, 101, 16)
    head = Head(head.weight_VH.to(head_dtype))
    expected = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=9, columns=20))
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu", autocast):
        found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=9, columns=20))
    found.sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_an_embedding_that_is_not_finite_has_a_loss_of_nan(kind, bad, chunks):
    x, head, targets = problem(kind, 7, 33, 5)
    with torch.no_grad():
        x[3, 2] = bad
    found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=chunks[0], columns=chunks[1]))
    assert found.isnan().tolist() == [row == 3 for row in range(7)]


@pytest.mark.parametrize("target", [-1, 33])
def test_a_target_outside_the_vocabulary_has_a_loss_of_nan(target):
    x, head, targets = problem("plain", 7, 33, 5)
    targets[4] = target
    found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=3, columns=7))
    assert found.isnan().tolist() == [row == 4 for row in range(7)]


@pytest.mark.parametrize("chunks", CHUNKS)
def test_tokens_that_a_bias_forbids(chunks):
    x, head, targets = problem("bias", 7, 33, 5)
    head.bias_V[:10] = -torch.inf  # whole tiles of them, and the first
    targets.clamp_(min=10)
    found = linear_cross_entropy(x, head, targets, chunks=Chunks(rows=chunks[0], columns=chunks[1]))
    found.sum().backward()
    expected, gradient = reference(x, head, targets, torch.ones(7))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert difference(x.grad, gradient) <= 1e-5


def test_an_unknown_implementation_is_refused():
    x, head, targets = problem("plain", 7, 33, 5)
    with pytest.raises(UsageError, match="Did you mean 'triton'"):
        linear_cross_entropy(x, head, targets, impl="tritn")


def test_triton_is_refused_where_it_cannot_run():
    x, head, targets = problem("plain", 7, 33, 5, torch.float64)
    with pytest.raises(UsageError, match=r"float64 on cpu.*`impl=` 'auto'"):
        linear_cross_entropy(x, head, targets, impl="triton")
