"""The budget: what is chosen by what recipes take, and what lives at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedcache.errors import DeviceMemoryError, UsageError
from embedcache.training.budget import memory
from embedcache.training.budget.allocator import peak_of
from embedcache.training.budget.memory import Footprint, candidates, choose
from embedcache.training.step.settings import Recipe
from embedcache.units import bytes_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHOICE = {"longest": 100, "step_tokens": 16384, "loss": "shortlist"}


def test_the_peak_is_of_all_that_lives_at_a_time():
    kept = []
    with peak_of(CPU, [torch.zeros(100)]) as peak:
        a = torch.ones(1000, 100)
        b = a * 2
        view = b[:10]
        del a
        kept.append(view.sum())
        b += 1
        del b, view
        torch.ones(10)
    assert peak == [400 + 800_000 + 0]
    weight = torch.randn(500, 500, requires_grad=True)
    with peak_of(CPU, []) as peak:
        x = torch.randn(2000, 500)
        (x @ weight).relu().square().sum().backward()
    # x, the product, what relu and square keep and give, the gradient of each on its way
    assert 4e6 * 4 < peak[0] < 4e6 * 6


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    monkeypatch.setattr(memory, "has_triton", lambda: True)


def test_a_line_through_two_sizes():
    line = Footprint.through({100: 1500, 300: 2500})
    assert (line.fixed, line.per_token) == (1000, 5.0)
    assert line.at(200) == 2000
    assert line.tokens(2999) == 399
    assert Footprint(1000, 0.0).tokens(999) == 0
    assert Footprint(1000, 5.0).tokens(10) < 1


def chosen(budget: int, footprints: dict[str, Footprint], *, freely=None, **more):
    recipes = candidates(CUDA, 100_000_000, 64, 32, loss="shortlist")

    def footprint(recipe: Recipe, most: int | None) -> Footprint | None:
        if most is None:
            assert recipe == recipes[-1]
            return freely
        assert most == budget
        name = "lean" if recipe.offload else "plain"
        name += "-host" if recipe.host_head else ""
        name += "-again" if recipe.recompute else ""
        return footprints.get(name)

    return choose(recipes, budget, footprint, **(CHOICE | more))


def test_the_first_recipe_that_holds_good_parts_is_chosen():
    plan = chosen(1_000_000, {"plain": Footprint(0, 10.0)})
    assert plan.recipe.part_tokens == 16384
    assert plan.expected == 163_840
    plan = chosen(1_000_000, {"plain": Footprint(0, 300.0), "plain-again": Footprint(0, 10.0)})
    assert (plan.recipe.part_tokens, plan.recipe.recompute) == (3136, False)
    assert plan.expected <= 950_000
    plan = chosen(1_000_000, {"plain": Footprint(0, 3000.0), "lean-host": Footprint(500, 300.0)})
    assert (plan.recipe.offload, plan.recipe.host_head) == (True, True)
    assert plan.recipe.part_tokens == 3136
    # None holds parts of 512 tokens: the best of small ones is better than nothing.
    plan = chosen(1_000_000, {"plain": Footprint(0, 3000.0)})
    assert plan.recipe.part_tokens == 316 // 64 * 64
    plan = chosen(1_000_000, {"plain": Footprint(0, 9000.0)})
    assert plan.recipe.part_tokens == 100
    plan = chosen(1_000_000, {"plain": Footprint(0, 10.0)}, step_tokens=50)
    assert plan.recipe.part_tokens == 100


def test_a_budget_that_is_too_small_is_told_the_least_that_would_do():
    footprints = {"plain": Footprint(900_000, 900.0), "lean-host-again": Footprint(500_000, 6000.0)}
    with pytest.raises(DeviceMemoryError, match=r"100 tokens.*1\.0 MB.*--memory 1\.1MB"):
        chosen(1_000_000, footprints)
    assert chosen(1_100_000, footprints).recipe.part_tokens == 128
    with pytest.raises(DeviceMemoryError, match=r"takes more\. Give more$"):
        chosen(1_000_000, {})
    # Where nothing could be measured within it, the leanest recipe is measured without.
    with pytest.raises(DeviceMemoryError, match=r"2\.1 MB at least\. Type: --memory 2\.2MB$"):
        chosen(1_000_000, {}, freely=Footprint(1_900_000, 1000.0))
    # An allocator's gaps count: more than what did not hold, if less is in use.
    with pytest.raises(DeviceMemoryError, match=r"1\.1 MB at least\. Type: --memory 1\.1MB$"):
        chosen(1_000_000, {}, freely=Footprint(800_000, 1000.0))


def test_host_memory_is_a_place_of_its_own_beside_a_gpu_alone(monkeypatch):
    found = candidates(CPU, 1 << 30, 64, 32, loss="shortlist")
    assert [(r.offload, r.host_head) for r in found] == [(False, False)] * 2

    def places() -> set[tuple[bool, bool]]:
        found = candidates(CUDA, 1 << 30, 64, 32, loss="shortlist")
        return {(recipe.offload, recipe.host_head) for recipe in found}

    assert len(places()) == 4
    monkeypatch.setattr(memory, "has_triton", lambda: False)
    assert places() == {(False, False), (False, True)}


def test_the_last_resort_is_not_recorded(recording):
    found = candidates(CUDA, 1 << 30, 64, 32, loss="shortlist")
    assert [recipe.capture for recipe in found] == [True] * 8 + [False]
    assert replace(found[-1], capture=True) == found[-2]


def test_small_parts_that_are_recorded_come_before_large_ones_that_are_not(recording):
    recipes = candidates(CUDA, 1 << 30, 64, 32, loss="shortlist")

    def plan(budget: int, recorded: float) -> Recipe:
        def footprint(recipe: Recipe, most: int | None) -> Footprint:
            return Footprint(0, recorded if recipe.capture else 100.0)

        return choose(recipes, budget, footprint, **CHOICE).recipe

    assert plan(1_000_000, 1500.0).capture  # parts of 633 tokens at most, and of 9,500
    assert plan(1_000_000, 9000.0).capture
    assert not plan(1_000_000, 9800.0).capture  # no sequence


def test_a_head_that_streams_wants_large_parts_and_is_not_recorded(recording):
    found = candidates(CUDA, 1 << 30, 64, 32, loss="exact")
    assert [recipe.capture for recipe in found] == [not recipe.host_head for recipe in found]
    assert len(found) == 8

    def plan(loss: str) -> Recipe:
        def footprint(recipe: Recipe, most: int | None) -> Footprint | None:
            if not (recipe.host_head and recipe.offload):
                return None  # the head alone is more than the budget
            return Footprint(0, 100.0 if recipe.recompute else 300.0)

        recipes = candidates(CUDA, 1_000_000, 64, 32, loss=loss)
        return choose(recipes, 1_000_000, footprint, **CHOICE | {"loss": loss}).recipe

    def beside(recipe: Recipe, most: int | None) -> Footprint:
        return Footprint(0, 100.0 if recipe.recompute or recipe.host_head else 300.0)

    # A head that the device has room for goes by nobody.
    recipes = candidates(CUDA, 1_000_000, 64, 32, loss="exact", recorded=False)
    found = choose(recipes, 1_000_000, beside, **CHOICE | {"loss": "exact"}).recipe
    assert (found.host_head, found.recompute, found.part_tokens) == (False, False, 3136)
    assert (plan("exact").recompute, plan("exact").part_tokens) == (True, 9472)
    assert (plan("shortlist").recompute, plan("shortlist").part_tokens) == (False, 3136)


@pytest.mark.parametrize("text", ["", "GB", "1 GiBs", "-1GB", "1,5GB"])
def test_a_size_that_is_none(text):
    with pytest.raises(UsageError, match="1GB"):
        bytes_of(text)
