"""AdamW over the bus against the PyTorch path: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch

from embedcache.training.config import TrainConfig
from embedcache.training.optim.lowbit import joined
from embedcache.training.optim.states import BETA1, EPSILON, HostStates, StepArguments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of what is masked
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
CONFIGS = [
    TrainConfig(weight_decay=0.3, beta2=0.9),
    TrainConfig(weight_decay=0.0, beta2=0.999),
    TrainConfig(weight_decay=0.1, beta2=0.5),
]


@pytest.fixture
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "no GPU; TRITON_INTERPRET=1 python -m pytest tests/training/optim/test_kernels.py"
        )
    return importlib.import_module("embedcache.training.optim.kernels")


@pytest.mark.parametrize("weights", [1, 2048, 5003])
@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_steps_states_where_they_lie(kernels, device, weights):
    torch.manual_seed(0)
    exact, matrices = torch.randn(3, weights), weights * 2 // 3
    kinds = [torch.device("cpu"), torch.device(device)]
    made = []
    for kind in kinds:
        values = torch.empty(3, weights, dtype=torch.bfloat16, device=kind)
        made.append((values, HostStates(values, exact, CONFIGS, matrices)))
    (_, plain), (values_KP, ours) = made
    largest, scale = torch.zeros(3, weights), 10.0 ** torch.randint(-9, 1, (weights,))
    for step in range(4):
        gradient = (torch.randn(3, weights).clamp_min(0.1) * scale).bfloat16()
        gradient[:, 3::7] = 0
        largest = torch.maximum(largest, gradient.float().abs())
        due = torch.tensor([[1e-3, 0.02, 0.1], [step] * 3, [0.0, float(step == 2), 0.0]])
        before = values_KP[1].clone(), ours.row(1)
        plain.step(gradient, StepArguments(*due))
        given = StepArguments(*due.to(device))
        states = ours._low_KP, ours._mean_KP, ours._square_KP
        kernels.step_over_bus(
            values_KP,
            gradient.to(device),
            states,
            given,
            ours._beta2_K,
            ours._decay_K,
            matrices,
            beta1=BETA1,
            epsilon=EPSILON,
        )
        if step == 2:
            assert torch.equal(before[0], values_KP[1])
            assert all(torch.equal(value, ours.row(1)[name]) for name, value in before[1].items())
        for k in range(3):
            found, expected = ours.row(k), plain.row(k)
            assert torch.equal(found["exact"], joined(values_KP[k].cpu(), ours._low_KP[k]))
            rate = due[0, k]
            torch.testing.assert_close(
                found["exact"], expected["exact"], rtol=1e-5, atol=float(rate) * 0.05
            )
            # The interpreter cuts bfloat16 off where a GPU rounds: a unit in the last place.
            apart = (found["exp_avg"] - expected["exp_avg"]).abs()
            assert (apart <= 2.0**-7 * largest[k]).all()
            apart = (found["exp_avg_sq"] - expected["exp_avg_sq"]).abs()
            assert (apart <= 0.004 * expected["exp_avg_sq"]).all()
    moved = torch.stack([ours.row(k)["exact"] for k in range(3)]) - exact
    assert (moved.abs().mean(dim=1) > due[0]).all()
