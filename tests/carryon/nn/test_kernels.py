"""The Triton kernels against PyTorch: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from support.carryons import change
from torch.nn import functional as F

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.nn import elementwise
from embedcache.carryon.nn.elementwise import rotary_angles, rotate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter's NumPy warns where exp of a masked column overflows.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
# The interpreter truncates bfloat16 where a GPU rounds: a unit in the last place.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """Import the kernels, if they can run here, and have few programs share a tensor."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 python -m pytest tests/carryon/nn/test_kernels.py")
    found = importlib.import_module("embedcache.carryon.nn.kernels")
    monkeypatch.setattr(found, "TILE", 256)
    monkeypatch.setattr(found, "PROGRAMS", 8)
    monkeypatch.setattr(found, "TILES", 2)
    return found


def draw(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def spaced(weight: torch.Tensor) -> torch.Tensor:
    """Copy a stack's weights to the layout of the optimiser: other values lie between two."""
    if weight.ndim == 1:
        return weight
    wide = torch.full((len(weight), weight.shape[1] + 5), torch.nan)
    wide = wide.to(weight.device, weight.dtype)
    wide[:, 3:-2] = weight
    return wide[:, 3:-2]


def compare(ours, oracle, given, tolerance: float) -> None:
    """Compare values and gradients with those in float64, relative to the largest of each."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    given = [None if x is None else x.detach().requires_grad_() for x in given]
    found, expected = ours(*given), oracle(*exact)
    upstream = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=upstream).to(y) for y in found]
    found += torch.autograd.grad(found, [x for x in given if x is not None], grads)
    grads = [grad.double() for grad in grads]
    expected += torch.autograd.grad(expected, [x for x in exact if x is not None], grads)
    for one, other in zip(found, expected, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * largest)


def norm_by_torch(h, more, weight):
    kept = h if more is None else h + more
    weight = weight if weight.ndim == 1 else weight[:, None, None]
    eps = torch.finfo(torch.float32).eps
    return kept, F.rms_norm(kept, kept.shape[-1:], eps=eps) * weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 2, 37, 64), (3, 1, 41, 64), (3, 2, 3, 1728), (2, 5, 48)])
@pytest.mark.parametrize(
    ("dtype", "more", "normed"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
    ],
)
def test_a_norm_of_a_sum(kernels, device, shape, dtype, more, normed):
    torch.manual_seed(0)
    h = draw(*shape, dtype=dtype, device=device)
    weight = draw(*(shape[:1] if len(shape) == 4 else ()), shape[-1], dtype=dtype, device=device)
    added = None if more is None else draw(*shape, dtype=more, device=device)

    def ours(h, more, weight):
        kept, found = kernels.residual_norm(h, more, weight, normed)
        assert (kept.dtype, found.dtype) == (dtype, normed)
        return kept, found

    tolerance = max(TOLERANCE[dtype], TOLERANCE[normed])
    compare(ours, norm_by_torch, (h, added, spaced(weight)), 2 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_of_strided_values_and_of_zeros(kernels, device):
    torch.manual_seed(0)
    h = draw(2, 19, 3, 40, dtype=torch.float32, device=device).movedim(2, 0)
    h[:, 0, 3] = 0
    weight = draw(3, 40, dtype=torch.float32, device=device)

    def ours(h, weight):
        return kernels.residual_norm(h, None, weight, h.dtype)[1:]

    compare(ours, lambda h, weight: norm_by_torch(h, None, weight)[1:], (h, weight), 2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("E", "width"), [(3, 48), (1, 2), (1, 256)])
@pytest.mark.parametrize(
    ("lead", "shared"), [((2, 9), True), ((3, 2, 5), True), ((3, 2, 5), False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations(kernels, device, E, width, lead, shared, dtype):
    torch.manual_seed(0)
    qkv = draw(*lead, 3, E, width, dtype=dtype, device=device)
    at = torch.randint(500, lead[-2:] if shared else lead)
    cos, sin = (part.to(device) for part in rotary_angles(at, width))

    def ours(qkv):
        return kernels.rotated(qkv, cos, sin)

    def oracle(qkv):
        q, k, v = qkv.unbind(-3)
        return rotate(q, (cos, sin)), rotate(k, (cos, sin)), v

    compare(ours, oracle, (qkv,), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_gradients_of_rotations(kernels, device):
    torch.manual_seed(0)
    cos, sin = (part.to(device) for part in rotary_angles(torch.arange(6).expand(2, 6), 8))

    def turned(function):
        def result(qkv):
            return tuple(part.transpose(-3, -2).contiguous() for part in function(qkv))

        return result

    ours = turned(lambda qkv: kernels.rotated(qkv, cos, sin))
    oracle = turned(lambda qkv: elementwise.rotated(qkv, (cos, sin)))
    qkv = draw(2, 3, 6, 2, 8, dtype=torch.float32, device=device).transpose(1, 2)
    if device == "cuda":
        oracle = turned(
            lambda qkv: (*(rotate(part, (cos, sin)) for part in qkv.unbind(2)[:2]), qkv[:, :, 2])
        )
    compare(ours, oracle, (qkv,), 2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 70, 40), (3, 1, 37, 300), (3, 2, 4, 64), (2, 5, 30)])
@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_gates(kernels, device, shape, dtype, bias):
    torch.manual_seed(0)
    branch, gate = (draw(*shape, dtype=dtype, device=device) * 3 for _ in range(2))
    one = (*(shape[:1] if len(shape) == 4 else ()), shape[-1])
    biases = [spaced(draw(*one, dtype=bias, device=device)) for _ in range(2)]

    def oracle(branch, gate, branch_bias, gate_bias):
        biases = [b if b.ndim == 1 else b[:, None, None] for b in (branch_bias, gate_bias)]
        return ((branch + biases[0]) * torch.sigmoid(gate + biases[1]),)

    compare(
        lambda *given: (kernels.gated(*given),), oracle, (branch, gate, *biases), TOLERANCE[dtype]
    )


def test_a_saturated_gate_has_no_gradient(kernels):
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], requires_grad=True)
    delta = kernels.gated(torch.ones(1, 4), gate, torch.zeros(4), torch.zeros(4))
    assert delta.tolist() == [[0, 0, 1, 1]]
    assert not torch.autograd.grad(delta.sum(), gate)[0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_carry_on_and_its_gradients(kernels, device, dtype, K, recompute, monkeypatch):
    """``dtype`` is the weights', with autocast to bfloat16; None is float32 without autocast."""
    torch.manual_seed(0)
    config = BranchConfig(width=48, head_width=16)
    models = [Branch(config, 40) for _ in range(max(1, K))]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model = (Branch.stack(models) if K else models[0]).to(device, dtype or torch.float32)
    model.recompute = recompute
    x = {"final": torch.randn(2, 13, 40).to(device)}
    at = torch.arange(13).expand(2, 13).to(device)
    results, chosen = [], []

    def forced(value: bool):
        def fused(x: torch.Tensor) -> bool:
            chosen.append(value)
            return value

        return fused

    for value in (True, False):
        monkeypatch.setattr(elementwise, "fused", forced(value))
        with torch.autocast(device, torch.bfloat16, enabled=dtype is not None):
            delta = change(model, x, positions_BT=at)
        upstream = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad((delta.float() * upstream.to(device)).sum(), weights)
        results.append([delta.float(), *(gradient.float() for gradient in gradients)])
    assert chosen.count(True) == chosen.count(False) >= 8
    tolerance = 1e-4 if dtype is None else 0.04
    for name, ours, oracle in zip(("delta", *names), *results, strict=True):
        error = (ours - oracle).norm() / oracle.norm()
        assert error <= tolerance, (name, error)
    with torch.no_grad():
        monkeypatch.setattr(elementwise, "fused", forced(True))
        with torch.autocast(device, torch.bfloat16, enabled=dtype is not None):
            torch.testing.assert_close(change(model, x, positions_BT=at).float(), results[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "R", "D"), [(8, 64, 32), (1, 256, 64), (2, 1728, 48)])
def test_full_sizes(K, R, D):
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = importlib.import_module("embedcache.carryon.nn.kernels")
    torch.manual_seed(0)
    N, H, low, device = 5003, 576, torch.bfloat16, "cuda"

    def weight(width: int) -> torch.Tensor:
        return spaced(draw(K, width, dtype=torch.float32, device=device))

    h = draw(K, 1, N, R, dtype=torch.float32, device=device)
    more = draw(K, 1, N, R, dtype=low, device=device)
    tolerance = 2 * TOLERANCE[low]
    compare(
        lambda *given: kernels.residual_norm(*given, low),
        norm_by_torch,
        (h, more, weight(R)),
        tolerance,
    )
    cos, sin = rotary_angles(torch.arange(N, device=device)[None], D)
    qkv = draw(K, 1, N, 3, R // D, D, dtype=low, device=device)

    def turned(qkv):
        q, k, v = qkv.unbind(-3)
        return rotate(q, (cos, sin)), rotate(k, (cos, sin)), v

    compare(lambda qkv: kernels.rotated(qkv, cos, sin), turned, (qkv,), tolerance)
    branch, gate = (draw(K, 1, N, H, dtype=low, device=device) for _ in range(2))

    def opened(branch, gate, branch_bias, gate_bias):
        logit = gate + gate_bias[:, None, None]
        return ((branch + branch_bias[:, None, None]) * torch.sigmoid(logit),)

    compare(
        lambda *given: (kernels.gated(*given),),
        opened,
        (branch, gate, weight(H), weight(H)),
        tolerance,
    )
