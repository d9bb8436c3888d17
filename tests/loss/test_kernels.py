"""The Triton kernels against PyTorch: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from support.loss_problems import HEADS, difference, problem, reference

from embedcache.loss import Chunks, VocabSubset, linear_cross_entropy, online_softmax
from embedcache.loss.online_softmax import OnlineSoftmax
from embedcache.loss.tiles import Tile

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter's NumPy warns where exp of a masked column overflows.
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
@pytest.mark.parametrize("above", [0.0, 2.0, 60.0])
def test_an_update_of_the_online_softmax(
    kernels, device, softcap, options, dtype, block, above, monkeypatch
):
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(kernels, "MAX_ABOVE_PEAK", above)
    N, C, width = 5, 43, 64
    torch.manual_seed(0)
    padded = torch.full((N, width), torch.nan, dtype=dtype, device=device)
    padded[:, :C] = torch.randn(N, C).to(device, dtype) * 4
    padded[2, :20] = -torch.inf
    bias = torch.randn(C, device=device) if options else None
    log_weight = torch.rand(C, device=device) if options else None
    weight, scale = torch.empty(C, 1, device=device), 0.7 if options else 1.0
    tile = Tile(100, VocabSubset(weight, bias, log_weight, scale, softcap))
    targets = torch.tensor([100, 99, 142, 143, 121], device=device)  # 99 and 143 are in other tiles
    results = []
    for step in (online_softmax.update, kernels.update):
        for needs_gradient in (True, False):
            buffer = padded.clone()
            state = OnlineSoftmax.empty(N, torch.float32, torch.device(device))
            state.peak_N[:2], state.total_N[:2] = 9.0, 3.0
            state.label_N[:2] = 0.5
            rescale = step(buffer[:, :C], tile, targets, state, needs_gradient=needs_gradient)
            dlogits = buffer[:, :C].float() if needs_gradient else torch.zeros(N, 1, device=device)
            results.append([dlogits, rescale, state.peak_N, state.total_N, state.label_N])
    for ours, oracle in zip(results[2:], results[:2], strict=True):
        below = oracle[2] - ours[2]
        assert ((below > -1e-6) & (below <= above + 1e-6)).all()
        factor = torch.exp(-below)  # makes ours relative to the same peak
        ours[:4] = ours[0] * factor[:, None], ours[1] * factor, ours[2] + below, ours[3] * factor
    # The interpreter truncates bfloat16 where a GPU rounds: a unit in the last place for each write
    # of a dlogit.
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
    """With ``same``, one factor is expanded, as autograd does for a mean."""
    torch.manual_seed(0)
    sums, head = torch.randn(7, hidden), torch.randn(11, hidden)
    factor, label = torch.rand(7), -torch.rand(7)
    place = torch.tensor([0, 10, 3, 3, 9, 1, 5])
    if same:
        factor = factor[:1].expand(7)
    found = []
    for step in (online_softmax.combine, kernels.combine):
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
@pytest.mark.parametrize("sizes", [(3, 40), (10_000, 10_000)])
def test_values_and_gradients(kernels, device, kind, dtype, nats, share, sizes):
    x, head, targets = problem(kind, 7, 101, 16, dtype, device)
    chunks = Chunks(rows=sizes[0], columns=sizes[1])
    found = linear_cross_entropy(x, head, targets, impl="triton", chunks=chunks)
    found.sum().backward()
    expected, gradient = reference(x, head, targets, torch.ones(7, device=device))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=nats)
    assert difference(x.grad, gradient) <= share


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [101, 50])
def test_a_logit_far_above_all_earlier_ones(kernels, device, columns, monkeypatch):
    """By 300 nats, where exp overflows in float32, in a later block."""
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
def test_dlogits_written_before_a_larger_logit_are_scaled_down(kernels, device, dtype):
    """With blocks of full size, and logits 5 to 90 nats above all earlier ones."""
    N, C = 16, 5 * kernels.BLOCK
    torch.manual_seed(0)
    logits = torch.randn(N, C, device=device)
    rises = torch.linspace(5, 90, N, device=device)
    for block in (1, 3):
        logits[torch.arange(N), block * kernels.BLOCK + torch.randint(4000, (N,))] = rises * block
    logits = logits.to(dtype)
    tile = Tile(0, VocabSubset(torch.empty(C, 1, device=device), None, None))
    targets = torch.randint(C, (N,), device=device)
    results = []
    for step in (online_softmax.update, kernels.update):
        dlogits = logits.clone()
        state = OnlineSoftmax.empty(N, torch.float32, torch.device(device))
        step(dlogits, tile, targets, state, needs_gradient=True)
        results.append((dlogits.float() / state.total_N[:, None], state.peak_N, state.total_N))
    (oracle, *at), (ours, *mine) = results
    torch.testing.assert_close(mine[0] + mine[1].log(), at[0] + at[1].log(), rtol=1e-6, atol=1e-5)
    # Each rescaling rounds a dlogit; in float16 tiny ones lose more.
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
    monkeypatch.setattr("embedcache.loss.triton.fused.MAX_HIDDEN", 0)  # its logits are float32
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
