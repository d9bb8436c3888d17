"""A run that runs out of memory goes on by a leaner plan, and learns the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import World

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.saving import load_carryon
from embedcache.errors import DeviceMemoryError
from embedcache.progress import Silent
from embedcache.training import trainer
from embedcache.training.budget.ladder import MemoryPlan
from embedcache.training.config import TrainConfig
from embedcache.training.optim.states import DeviceStates
from embedcache.training.run.run import TrainSummary
from embedcache.training.step.settings import StepSettings
from embedcache.training.step.stack import Stack
from embedcache.training.sweep import sweep
from embedcache.training.train import train

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=2),
    epochs=2,
    batch_tokens=256,
    lr=5e-3,
    loss="shortlist",
    samples=64,
)
BUDGET = 12_000_000


def fail_once(monkeypatch, owner: object, name: str, call: int, *, after: bool = False) -> list:
    """Run out of memory at one call of a function: before it does anything, or after half of it."""
    function, calls = getattr(owner, name), []

    def failing(*given, **more):
        calls.append(1)
        if len(calls) == call:
            if after:
                function(*given, **more)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*given, **more)

    monkeypatch.setattr(owner, name, failing)
    return calls


PLACES = {
    "step 0": (Stack, "differentiate", 1, False),
    "the middle": (Stack, "differentiate", 5, False),
    "the optimiser's step": (DeviceStates, "step", 4, True),
    "scoring the base": (trainer, "dev_losses", 1, False),
    "scoring dev": (trainer, "dev_losses", 2, False),
}


def rows(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def outcome(summary: TrainSummary) -> TrainSummary:
    """Return a summary without what is measured in time, and without its folder and plan."""
    measured = {"seconds": 0.0, "tokens_per_second": 0.0, "data_wait": 0.0}
    return replace(summary, out="", memory=None, **measured)


def same_settings(patch: pytest.MonkeyPatch) -> list[MemoryPlan | None]:
    """Plan the same settings each time, so that results are equal bit for bit."""
    asked: list[MemoryPlan | None] = []

    def plan(inputs, configs, loss, budget, *, below=None):
        asked.append(below)
        settings = StepSettings(part_tokens=128)
        return MemoryPlan(name="", settings=settings, rung=len(asked), budget=budget, expected=1)

    patch.setattr(trainer, "plan_memory", plan)
    return asked


FLAGS = {"config": CONFIG, "device": "cpu", "memory": BUDGET}


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory) -> tuple[Path, TrainSummary]:
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    with pytest.MonkeyPatch.context() as patch:
        same_settings(patch)
        return out, train(world.cache_path, out=out, **FLAGS)


@pytest.mark.parametrize("place", PLACES)
def test_the_result_is_that_of_an_undisturbed_run(
    world: World, undisturbed, tmp_path, monkeypatch, place
):
    plain, expected = undisturbed
    asked, out = same_settings(monkeypatch), tmp_path / "c"
    owner, name, call, after = PLACES[place]
    calls = fail_once(monkeypatch, owner, name, call, after=after)
    found = train(world.cache_path, out=out, **FLAGS)
    assert len(calls) > call
    assert [below and below.rung for below in asked] == [None, 1]
    assert outcome(found) == outcome(expected)
    assert rows(out) == rows(plain)
    weights, others = (load_carryon(folder)[0].state_dict() for folder in (plain, out))
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@pytest.mark.parametrize("memory", [None, BUDGET])
def test_a_leaner_plan_is_measured_and_said(world, tmp_path, monkeypatch, memory):
    said: list[str] = []

    class Noted(Silent):
        def say(self, remark: str) -> None:
            said.append(remark)

    flags = {"config": replace(CONFIG, loss="exact"), "device": "cpu"}
    plain = train(world.cache_path, out=tmp_path / "plain", **flags)
    for call in (3, 5):
        fail_once(monkeypatch, Stack, "finish", call * 4)
    found = train(world.cache_path, out=tmp_path / "c", memory=memory, progress=Noted(), **flags)
    assert "Out of memory; retrying with a smaller plan." in said
    plans = [text for text in said if text.startswith("memory: ")]
    assert len(plans) == len(set(plans)) == (1 if memory is None else 2) + 1
    assert plans[-1] == f"memory: {found.memory}"
    assert found.best_dev == pytest.approx(plain.best_dev, rel=1e-3)


def test_a_run_at_the_last_plan_goes_on_while_it_advances(world, tmp_path, monkeypatch):
    """With no leaner plan the same one is tried again, from where the run came to."""

    def plan(inputs, configs, loss, budget, *, below=None):
        if below is not None:
            raise DeviceMemoryError("none is leaner")
        return MemoryPlan(
            name="", settings=StepSettings(part_tokens=128), rung=0, budget=1, expected=1
        )

    monkeypatch.setattr(trainer, "plan_memory", plan)
    differentiate, calls = Stack.differentiate, []

    def failing(self, work):
        calls.append(1)
        if len(calls) % 9 == 0:
            raise torch.OutOfMemoryError
        return differentiate(self, work)

    monkeypatch.setattr(Stack, "differentiate", failing)
    assert train(world.cache_path, out=tmp_path / "c", **FLAGS).epochs == 2
    assert len(calls) > 18

    def never(self, work):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Stack, "differentiate", never)
    with pytest.raises(DeviceMemoryError, match="step 0, and no smaller plan fits"):
        train(world.cache_path, out=tmp_path / "d", **FLAGS)


def test_a_sweep_without_a_leaner_plan_goes_on_in_halves(world, tmp_path, monkeypatch):
    plan, sizes = trainer.plan_memory, []

    def none_leaner(*given, below=None):
        if below is not None:
            raise DeviceMemoryError("none is leaner")
        return plan(*given)

    differentiate = Stack.differentiate

    def one_alone(self, work):
        sizes.append(len(work))
        if len(work) > 1 and len(sizes) > 10:
            raise torch.OutOfMemoryError
        return differentiate(self, work)

    monkeypatch.setattr(trainer, "plan_memory", none_leaner)
    monkeypatch.setattr(Stack, "differentiate", one_alone)
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    results = sweep(world.cache_path, runs=runs, device="cpu", memory=50_000_000)
    assert all(result.failure is None for result in results)
    assert sizes[-1] == 1
    monkeypatch.setattr(Stack, "differentiate", differentiate)
    for seed, result in enumerate(results):
        out = tmp_path / f"alone{seed}"
        alone = train(world.cache_path, out=out, config=result.config, device="cpu")
        assert result.summary.best_dev == pytest.approx(alone.best_dev, rel=1e-3)
