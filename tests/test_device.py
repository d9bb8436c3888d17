"""Which precision training's products are in."""

from __future__ import annotations

import pytest
import torch

from embedcache.device import fast_dtype
from embedcache.training import inputs as inputs_module
from embedcache.training.config import TrainConfig
from embedcache.training.step.stack import Stack
from embedcache.training.train import train


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_has_units_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype(torch.device("cpu")) == expected
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_precision_is_of_products_alone(world, tmp_path, monkeypatch, loss):
    """Weights stay float32, dev is scored in float32, and both come to about the same."""
    seen, best = set(), []
    differentiate = Stack.differentiate

    def noted(self, work):
        seen.add((self._inputs.dtype, self.optimizer.values_KP.dtype))
        return differentiate(self, work)

    monkeypatch.setattr(Stack, "differentiate", noted)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(inputs_module, "fast_dtype", lambda device, dtype=dtype: dtype)
        config = TrainConfig(epochs=2, loss=loss)
        summary = train(world.cache_path, out=tmp_path / str(dtype), config=config, device="cpu")
        best.append((summary.base_dev, summary.best_dev))
    assert seen == {(torch.float32, torch.float32), (torch.bfloat16, torch.float32)}
    assert best[0][0] == best[1][0]
    assert best[0][1] == pytest.approx(best[1][1], rel=5e-3)
    assert best[0][1] != best[1][1]
