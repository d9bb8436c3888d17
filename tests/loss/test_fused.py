"""The fused product and softmax update: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from support.loss_problems import HEADS, difference, problem, reference
from torch import Tensor

from embedcache.base.head import Head
from embedcache.loss import Chunks, VocabSubset, linear_cross_entropy

# Interpreted, products of bfloat16 are not what a GPU's are; compiled, only those are taken.
DEVICES = [
    pytest.param("cpu", torch.float32, id="cpu"),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu, id="cuda"),
]
SHAPES = [(37, 104, 40), (300, 1000, 40)]  # N, V, H: one H, so that kernels are compiled once
WHOLE = Chunks(rows=128, columns=10**6)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.parametrize(("device", "dtype"), DEVICES),
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the kernels, if they can run here, and count the positions that they compute."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("they are for NVIDIA's Hopper")
    elif os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 python -m pytest tests/loss/test_fused.py")
    module = importlib.import_module("embedcache.loss.triton.fused")
    if not torch.cuda.is_available():  # several tiles of small problems
        for name, size in {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_H": 16}.items():
            monkeypatch.setattr(module, name, size)
    real = module.fused_dlogits

    def counted(x_NH: Tensor, *more: object, **named: object) -> None:
        module.positions += len(x_NH)
        real(x_NH, *more, **named)

    monkeypatch.setattr(module, "positions", 0, raising=False)
    monkeypatch.setattr(module, "fused_dlogits", counted)
    return module


def computed(x: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each position, and x's gradient."""
    loss = linear_cross_entropy(x, head, targets, impl="triton", chunks=WHOLE)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def close(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> bool:
    """Say whether both are near: logits are float32, dlogits of the embedding's dtype."""
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-6, atol=5e-5)
    return difference(found[1], expected[1]) <= (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(fused, device, dtype, kind, shape):
    x, head, targets = problem(kind, *shape, dtype, device)
    found = computed(x, head, targets)
    assert fused.positions == shape[0]
    assert close(found, reference(x, head, targets, torch.ones(shape[0], device=device)), dtype)


def test_one_position_of_few_columns_and_no_gradient(fused, device, dtype):
    x, head, targets = problem("all", 1, 4, 40, dtype, device)
    found = computed(x, head, targets)
    assert close(found, reference(x, head, targets, torch.ones(1, device=device)), dtype)
    with torch.no_grad():
        assert linear_cross_entropy(x, head, targets, impl="triton", chunks=WHOLE).equal(found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_a_real_head_s_shape(fused, device, dtype, kind):
    if device == "cpu":
        pytest.skip("too large to interpret")
    x, head, targets = problem(kind, 1500, 49_152, 576, dtype, device)
    with torch.no_grad():
        head.weight_VH.mul_(4 * 576**-0.5)
    found = computed(x, head, targets)
    assert fused.positions == 1500
    assert close(found, reference(x, head, targets, torch.ones(1500, device=device)), dtype)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_columns_with_log_weights(fused, device, dtype, kind):
    x, head, targets = problem(kind, 37, 104, 40, dtype, device)
    log_weight = torch.linspace(-3, 3, 104, device=device)
    subset = replace(VocabSubset.whole(head), log_weight_C=log_weight)
    loss = linear_cross_entropy(x, head, targets, subset=subset, impl="triton", chunks=WHOLE)
    assert fused.positions == 37
    other = x.detach().double().requires_grad_()
    wide = replace(
        subset,
        weight_CH=head.weight_VH.double(),
        bias_C=None if head.bias_V is None else head.bias_V.double(),
        log_weight_C=log_weight.double(),
    )
    expected = linear_cross_entropy(other, head, targets, subset=wide, impl="torch", chunks=WHOLE)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    (oracle,) = torch.autograd.grad(expected.sum(), other)
    assert close((loss.detach(), gradient), (expected.detach(), oracle), dtype)


def test_logits_far_above_the_label_s(fused, device, dtype):
    """By 1 to 300 nats: above 60 a position is computed again, above 88 exp overflows."""
    x, head, targets = problem("plain", 64, 104, 40, dtype, device)
    targets[:] = 3
    with torch.no_grad():
        x.abs_()
        head.weight_VH.clamp_(-1, 1)
        head.weight_VH[70] = 1
        x.mul_(torch.linspace(0.01, 10, 64, device=device, dtype=dtype)[:, None])
    expected = reference(x, head, targets, torch.ones(64, device=device))
    assert expected[0].min() < 5 and (expected[0] > 100).sum() > 10
    near_the_limit = (expected[0] > 50) & (expected[0] < 70)
    assert near_the_limit.sum() > 2
    assert close(computed(x, head, targets), expected, dtype)


def test_small_losses_are_exact(fused, device, dtype):
    x, head, targets = problem("plain", 37, 104, 40, dtype, device)
    with torch.no_grad():
        x.copy_(head.weight_VH[targets] * torch.linspace(0.1, 1, 37, device=device)[:, None])
    found, _ = computed(x, head, targets)
    expected, _ = reference(x, head, targets, torch.ones(37, device=device))
    assert expected.min() < 1e-9
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_embedding_that_is_not_finite_has_a_loss_of_nan(fused, device, dtype, bad):
    for kind in ("plain", "all"):
        x, head, targets = problem(kind, 37, 104, 40, dtype, device)
        with torch.no_grad():
            x[3, 2] = bad
        found = linear_cross_entropy(x, head, targets, impl="triton", chunks=WHOLE)
        assert found.isnan().tolist() == [row == 3 for row in range(37)]


def test_a_label_outside_the_columns_has_a_loss_of_nan(fused, device, dtype):
    x, head, targets = problem("plain", 37, 104, 40, dtype, device)
    targets[5], targets[6] = 104, -1
    found, _ = computed(x, head, targets)
    assert found.isnan().tolist() == [row in (5, 6) for row in range(37)]


def test_banned_tokens(fused, device, dtype):
    """With a bias of -inf a token has probability 0, and an infinite loss as a label."""
    x, head, targets = problem("bias", 37, 104, 40, dtype, device)
    head.bias_V[::3] = -torch.inf
    targets[:] = torch.arange(37, device=device)
    found, gradient = computed(x, head, targets)
    allowed = targets % 3 != 0
    expected, exact = reference(x, head, targets, allowed.double())
    assert found[~allowed].isinf().all()
    assert close((found[allowed], gradient[allowed]), (expected[allowed], exact[allowed]), dtype)


def test_other_widths_and_dtypes_are_computed_by_a_product(fused, device, dtype):
    for H, other in ((9, dtype), (2056, dtype), (40, torch.float16)):
        x, head, targets = problem("plain", 7, 104, H, other, device)
        found = computed(x, head, targets)
        assert fused.positions == 0, (H, other)
        expected = reference(x, head, targets, torch.ones(7, device=device))
        assert difference(found[1], expected[1]) <= 2e-2
