"""Kinds of carry-on: found by their folder, built by name, and blended by α in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import World

from embedcache.carryon import registry
from embedcache.carryon.blend import blend
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.protocol import CarryOn, CarryOnInputs
from embedcache.carryon.registry import Kind, build, config_from_dict, kinds
from embedcache.errors import UsageError
from embedcache.evaluation.evaluate import evaluate
from embedcache.training.train import train


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ShiftConfig(CarryOnConfig):
    kind: ClassVar[str] = "shift"

    def values_per_token(self, hidden: int) -> int:
        return 2 * hidden


class Shift(CarryOn):
    """The smallest kind: it adds one trained vector to every embedding."""

    def __init__(self, config: ShiftConfig, hidden: int):
        super().__init__(config, hidden)
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden))

    def features(self, inputs: CarryOnInputs, alpha=1.0) -> torch.Tensor:
        shift = self.weight if self.weight.ndim == 2 else self.weight[:, None]
        return inputs.x_BTH["final"] + shift

    def embeddings(self, h, x, alpha=1.0) -> torch.Tensor:
        return blend(x, h.to(x.dtype) - x, alpha)

    @property
    def key_value_layers(self) -> int:
        return 0


def test_the_branch_registers_itself():
    assert kinds()["branch"].config is BranchConfig
    assert isinstance(build(BranchConfig(width=32), 16), Branch)
    assert config_from_dict({"width": 32}) == BranchConfig(width=32)
    assert config_from_dict(BranchConfig(width=32).to_dict()) == BranchConfig(width=32)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match=r"found 'brunch'\. Did you mean 'branch'"):
        config_from_dict({"kind": "brunch"})


def test_a_further_kind_trains_and_is_evaluated(world: World, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(kinds()))
    registry.register(Kind(ShiftConfig, f"{__name__}:Shift"))
    monkeypatch.setattr(Kind, "model_class", lambda kind: Shift)
    train(world.cache_path, out=tmp_path / "c", carryon=ShiftConfig(), epochs=3, lr=0.02)
    found = evaluate(tmp_path / "c", world.cache_path, split="dev", device="cpu")
    assert found.rows[0]["cross_entropy"] < found.base_cross_entropy


def test_blend_is_the_formula_row_by_row():
    torch.manual_seed(0)
    x, change = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for alpha in (0.0, 0.3, 1.0, -1.0):
        torch.testing.assert_close(blend(x, change, alpha), x + alpha * change)
    alphas = torch.tensor([0.0, 0.5, 1.0])[:, None]
    change[0] = torch.inf
    found = blend(x, change, alphas)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x[1] + 0.5 * change[1])
    torch.testing.assert_close(found[2], x[2] + change[2])
