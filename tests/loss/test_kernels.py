"""Triton's kernel against the PyTorch path: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from support.loss_problems import HEADS, difference, problem, reference

from embedcache.loss import Chunks, VocabSubset, linear_cross_entropy
from embedcache.loss import tile_update as absorb_module
from embedcache.loss.online_softmax import Running
from embedcache.loss.tile_update import absorb
from embedcache.loss.tiles import Tile

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# NumPy, which interprets, says so where exp of a masked column overflows.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture
def kernels() -> ModuleType:
    """Import the kernels, if they can run here."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 python -m pytest tests/loss/test_kernels.py")
    return importlib.import_module("embedcache.loss.triton.kernels")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 8192])
@pytest.mark.parametrize("far", [0.0, 2.0, 60.0])
def test_a_step_of_the_running_softmax(
    kernels, device, softcap, options, dtype, block, far, monkeypatch
):
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(kernels, "FAR", far)
    R, C, width = 5, 43, 64
    torch.manual_seed(0)
    padded = torch.full((R, width), torch.nan, dtype=dtype, device=device)
    padded[:, :C] = torch.randn(R, C).to(device, dtype) * 4
    padded[2, :20] = -torch.inf
    bias = torch.randn(C, device=device) if options else None
    log_weight = torch.rand(C, device=device) if options else None
    tile = Tile(100, VocabSubset(torch.empty(C, 1, device=device), bias, log_weight))
    targets = torch.tensor([100, 99, 142, 143, 121], device=device)  # 99 and 143: other tiles'
    settings = {"scale": 0.7 if options else 1.0, "softcap": softcap}
    results = []
    for step in (absorb, kernels.absorb_by_triton):
        for needs_gradient in (True, False):
            buffer = padded.clone()
            running = Running.start(R, torch.float32, torch.device(device))
            running.peak_R[:2], running.total_R[:2] = 9.0, 3.0
            running.label_R[:2] = 0.5
            shrink = step(
                buffer[:, :C], tile, targets, running, needs_gradient=needs_gradient, **settings
            )
            slopes = buffer[:, :C].float() if needs_gradient else torch.zeros(R, 1, device=device)
            results.append([slopes, shrink, running.peak_R, running.total_R, running.label_R])
    for ours, oracle in zip(results[2:], results[:2], strict=True):
        below = oracle[2] - ours[2]
        assert ((below > -1e-6) & (below <= far + 1e-6)).all()
        factor = torch.exp(-below)  # as if ours were relative to the same peak
        ours[:4] = ours[0] * factor[:, None], ours[1] * factor, ours[2] + below, ours[3] * factor
    # The interpreter cuts bfloat16 off where a GPU rounds: a unit in the last place, each time that
    # a slope is written.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7 * (6 if block < C else 1)
    for ours, oracle in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(ours[0], oracle[0], rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(ours[1:], oracle[1:], rtol=2e-6, atol=2e-6, equal_nan=True)
    assert results[2][4].isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [40, 1500])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_sums_and_labels_make_a_gradient(kernels, device, dtype, hidden, labels, same):
    """Where the ``same`` factor is that of all, it is one that is expanded, as autograd has it."""
    torch.manual_seed(0)
    sums, head = torch.randn(7, hidden), torch.randn(11, hidden)
    factor, label = torch.rand(7), -torch.rand(7)
    place = torch.tensor([0, 10, 3, 3, 9, 1, 5])
    if same:
        factor = factor[:1].expand(7)
    found = []
    for step in (absorb_module.combine, kernels.combine_by_triton):
        moved = sums.to(device, dtype, copy=True)
        given = [value.to(device) for value in (factor, head.to(dtype), place, label)]
        step(moved, given[0], tuple(given[1:]) if labels else None, out=moved)  # in place
        found.append(moved.float().cpu())
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    exact = sums.to(dtype) * factor[:, None]
    if labels:
        exact += head.to(dtype)[place] * label[:, None]
    torch.testing.assert_close(found[0], exact.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("dtype", "nats", "share"),
    [
        (torch.float32, 2e-5, 1e-5),
        (torch.bfloat16, 6e-2, 2e-2),
    ],
)
@pytest.mark.parametrize("cuts", [(3, 40), (10_000, 10_000)])
def test_values_and_gradients(kernels, device, kind, dtype, nats, share, cuts):
    x, head, targets = problem(kind, 7, 101, 16, dtype, device)
    chunks = Chunks(rows=cuts[0], columns=cuts[1])
    found = linear_cross_entropy(x, head, targets, impl="triton", chunks=chunks)
    found.sum().backward()
    expected, gradient = reference(x, head, targets, torch.ones(7, device=device))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=nats)
    assert difference(x.grad, gradient) <= share


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [101, 50])
def test_logits_far_above_those_before_are_all_there_is(kernels, device, columns, monkeypatch):
    """By 300 nats, past what float32 holds of exp, in a block of its own."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    x, head, targets = problem("plain", 7, 101, 16, torch.float32, device)
    with torch.no_grad():
        x[:4] = x[:4].abs()
        head.weight_VH[70] = 300 / x[:4].sum(dim=1).min()
    chunks = Chunks(rows=10_000, columns=columns)
    found = linear_cross_entropy(x, head, targets, impl="triton", chunks=chunks)
    found.sum().backward()
    expected, gradient = reference(x, head, targets, torch.ones(7, device=device))
    assert (expected[:4] > 200).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5)
    assert difference(x.grad, gradient) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_programs_of_many_warps_scale_down_what_they_wrote(kernels, device, dtype):
    """Blocks as they are in use, the highest logit 5 to 90 nats above all that came before."""
    R, C = 16, 5 * kernels.BLOCK
    torch.manual_seed(0)
    logits = torch.randn(R, C, device=device)
    rises = torch.linspace(5, 90, R, device=device)
    for block in (1, 3):
        logits[torch.arange(R), block * kernels.BLOCK + torch.randint(4000, (R,))] = rises * block
    logits = logits.to(dtype)
    tile = Tile(0, VocabSubset(torch.empty(C, 1, device=device), None, None))
    targets = torch.randint(C, (R,), device=device)
    results = []
    for step in (absorb, kernels.absorb_by_triton):
        slopes, running = logits.clone(), Running.start(R, torch.float32, torch.device(device))
        step(slopes, tile, targets, running, scale=1.0, softcap=None, needs_gradient=True)
        results.append((slopes.float() / running.total_R[:, None], running.peak_R, running.total_R))
    (oracle, *at), (ours, *mine) = results
    torch.testing.assert_close(mine[0] + mine[1].log(), at[0] + at[1].log(), rtol=1e-6, atol=1e-5)
    # Each time that it is scaled down a slope is rounded, and in float16 what is tiny once more.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, oracle, rtol=4 * unit, atol=1e-6 if unit < 1e-3 else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_embedding_that_is_not_finite_has_a_loss_of_nan(kernels, device, kind, bad):
    x, head, targets = problem(kind, 7, 33, 5, device=device)
    with torch.no_grad():
        x[3, 2] = bad
    found = linear_cross_entropy(x, head, targets, impl="triton", chunks=Chunks(rows=3, columns=10))
    assert found.isnan().tolist() == [row == 3 for row in range(7)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 3, 2), (300, 50_257, 64), (130, 9_001, 576)])
def test_both_implementations_agree_on_a_gpu(kernels, kind, dtype, shape, monkeypatch):
    monkeypatch.setattr("embedcache.loss.triton.fused.MOST_HIDDEN", 0)  # whose logits are finer
    x, head, targets = problem(kind, *shape, dtype, "cuda")
    if kind in ("plain", "bias"):
        head.weight_VH.mul_(shape[2] ** -0.5)
    results = []
    for impl in ("torch", "triton"):
        loss = linear_cross_entropy(x, head, targets, impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        results.append((loss, gradient))
    (loss, gradient), (oracle_loss, oracle_gradient) = results[1], results[0]
    torch.testing.assert_close(loss, oracle_loss, rtol=1e-5, atol=1e-5)
    assert difference(gradient, oracle_gradient.double()) <= (
        1e-5 if dtype == torch.float32 else 5e-3
    )
