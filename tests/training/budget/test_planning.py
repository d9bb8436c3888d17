"""Plans as they are measured, and that training keeps within them."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import World
from typer.testing import CliRunner

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.errors import DeviceMemoryError
from embedcache.training import trainer
from embedcache.training.budget import planning
from embedcache.training.budget.allocator import peak_of
from embedcache.training.budget.memory import MemoryPlan
from embedcache.training.budget.planning import plan_memory
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE
from embedcache.training.inputs import Materials
from embedcache.training.loop import Loop
from embedcache.training.step import cuda_graph as captured
from embedcache.training.step.cuda_graph import Captured
from embedcache.training.step.settings import PLAIN
from embedcache.training.step.stack import Stack
from embedcache.training.train import sweep, train
from embedcache.units import bytes_of
from embedcache_cli.app import app

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=2), epochs=1, batch_tokens=1024, loss="exact"
)


@pytest.fixture(autouse=True)
def two_parts(monkeypatch):
    """Try as many parts of a size as tell what the next takes: none is made ahead on a CPU."""
    monkeypatch.setattr(planning, "PARTS", 2)


@pytest.mark.parametrize("room", [True, False])
def test_a_plan_is_of_recorded_parts_where_there_is_room(world, recording, monkeypatch, room):
    record, tried = Captured._record, []

    def recorded(self, work):
        tried.append(1)
        if not room:
            raise torch.OutOfMemoryError
        return record(self, work)

    monkeypatch.setattr(Captured, "_record", recorded)
    monkeypatch.setattr(captured, "record", lambda part, *given, **more: (Mock(), part()))
    materials = Materials(world.cache(), CPU, ALONE)
    plan = plan_memory(materials, [CONFIG], "exact", 12_000_000)
    assert tried
    assert plan.recipe.capture is room


def test_what_a_recipe_that_is_left_would_take_is_not_told_once_one_did_not_hold(
    world, monkeypatch
):
    footprint = planning._Trials.footprint

    def measured(self, recipe, budget):
        return None if recipe.recompute else footprint(self, recipe, budget)

    monkeypatch.setattr(planning._Trials, "footprint", measured)
    monkeypatch.setattr(planning._Trials, "holds", lambda *given: False)
    with pytest.raises(DeviceMemoryError, match="--memory 13"):
        plan_memory(Materials(world.cache(), CPU, ALONE), [CONFIG], "exact", 12_000_000)


def test_a_recorded_plan_that_does_not_hold_is_tried_without_recordings(
    world, tmp_path, monkeypatch, recording
):
    monkeypatch.setattr(captured, "record", lambda part, *given, **more: (Mock(), part()))
    take, tried = Loop._take, []

    def tight(self, everywhere):
        recipe = self._stack.recipe
        tried.append((recipe.part_tokens, recipe.capture))
        if recipe.capture:
            raise torch.OutOfMemoryError
        return take(self, everywhere)

    monkeypatch.setattr(Loop, "_take", tight)
    monkeypatch.setattr(MemoryPlan, "smaller", lambda *given: None)  # where parts are the smallest
    out = tmp_path / "c"
    result = train(world.cache_path, out=out, config=CONFIG, device="cpu", memory=12_000_000)
    tokens = tried[0][0]
    assert tried[:2] == [(tokens, True), (tokens, False)]
    assert "recorded" not in result.memory and result.best_dev < result.base_dev
    tried.clear()

    def never(self, everywhere):
        tried.append((self._stack.recipe.part_tokens, self._stack.recipe.capture))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Loop, "_take", never)
    with pytest.raises(DeviceMemoryError, match="step 0"):
        train(world.cache_path, out=tmp_path / "d", config=CONFIG, device="cpu", memory=12_000_000)
    assert tried == [(tokens, True), (tokens, False)]


def test_plans_say_recorded_of_what_is(world, recording, monkeypatch):
    """Not of carry-ons that see batches of their own, nor of many."""
    monkeypatch.setattr(captured, "record", lambda part, *given, **more: (Mock(), part()))
    for module in (captured, planning):
        monkeypatch.setattr(module, "MOST", 2)
    materials = Materials(world.cache(), CPU, ALONE)
    for seeds, order, recorded in ((2, 0, True), (2, None, False), (3, 0, False)):
        configs = [replace(CONFIG, seed=seed, order_seed=order) for seed in range(seeds)]
        plan = plan_memory(materials, configs, "exact", 50_000_000)
        assert plan.recipe.capture is recorded


def test_what_is_kept_alone_is_more_than_a_budget(world, monkeypatch):
    """Nothing is tried then, but for the least that would do."""
    tried, measured = [], planning._Trials._measured

    def noted(self, recipe, budget):
        tried.append(budget)
        return measured(self, recipe, budget)

    monkeypatch.setattr(planning._Trials, "_measured", noted)
    materials = Materials(world.cache(), CPU, ALONE)
    weights = Branch(CONFIG.carryon, 32).parameter_count()
    head = materials.inputs(CONFIG.carryon, PLAIN, training=True).head.weight_VH.nbytes
    for budget in (head + 16 * weights - 1, head + 16 * weights):
        with pytest.raises(DeviceMemoryError, match="at least"):
            plan_memory(materials, [CONFIG], "exact", budget)
    assert tried == [None, head + 16 * weights, head + 16 * weights]


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_training_keeps_within_its_budget(world: World, tmp_path, monkeypatch, loss):
    """Every gradient of the loop is measured; with less memory the parts are smaller."""
    peaks: dict[int, list[int]] = {}
    differentiate, planned, train_loop, looping = Stack.differentiate, [], Loop.train, []

    def looped(self):
        looping.append(1)
        train_loop(self)
        looping.clear()

    monkeypatch.setattr(Loop, "train", looped)
    config = replace(CONFIG, loss=loss, samples=100)
    for budget in (12_000_000, 3_000_000):
        peaks[budget] = []

        def measured(self, work, budget=budget):
            if not looping:
                return differentiate(self, work)
            held = [self.optimizer.values_KP, self.optimizer.gradient_KP]
            states = self.optimizer._states
            held += [states._mean_KP, states._square_KP, self._inputs.head.weight_VH]
            held += [*work[0].inputs.tensors()] * 3
            with peak_of(CPU, held) as peak:
                loss_K = differentiate(self, work)
            peaks[budget].append(peak[0])
            planned.append((budget, self.recipe.part_tokens))
            return loss_K

        monkeypatch.setattr(Stack, "differentiate", measured)
        train(
            world.cache_path,
            out=tmp_path / str(budget),
            config=config,
            device="cpu",
            memory=budget,
        )
        assert 0.2 * budget < max(peaks[budget]) < budget
    parts = dict(planned)
    assert parts[3_000_000] < parts[12_000_000]


def test_a_sweep_keeps_within_its_budget_too(world, tmp_path):
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    results = sweep(world.cache_path, runs=runs, device="cpu", memory=8_000_000)
    assert all(result.failure is None for result in results)


def test_a_sweep_that_does_not_fit_is_trained_in_halves(world, tmp_path, monkeypatch):
    planned, sizes = trainer.plan_memory, []

    def one_alone(materials, configs, loss, budget):
        sizes.append(len(configs))
        if len(configs) > 1:
            raise DeviceMemoryError("too many")
        return planned(materials, configs, loss, budget)

    monkeypatch.setattr(trainer, "plan_memory", one_alone)
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    results = sweep(world.cache_path, runs=runs, device="cpu", memory=200_000_000)
    assert all(result.summary is not None for result in results)
    assert sizes == [3, 1, 2, 1, 1]


def test_a_budget_that_holds_no_sequence_leaves_nothing(world, tmp_path):
    with pytest.raises(DeviceMemoryError, match="a sequence of 64 tokens") as refused:
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu", memory=200_000)
    least = bytes_of(str(refused.value).split()[-1])
    assert least > 300_000  # as measured, not by the budget
    train(world.cache_path, out=tmp_path / "d", config=CONFIG, device="cpu", memory=least)
    assert not (tmp_path / "c").exists()


def test_the_command_prints_its_plan(world, tmp_path):
    out = tmp_path / "c"
    flags = ["train", str(world.cache_path), "--out", str(out), "--epochs", "1", "--device", "cpu"]
    found = CliRunner().invoke(app, [*flags, "--memory", "12MB", "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert "12.0 MB" in plan["memory"]
    assert not out.exists()
    found = CliRunner().invoke(app, [*flags, "--memory", "12MB"])
    assert found.exit_code == 0, found.output
    assert "memory: " in found.stderr
    assert (out / "carryon.safetensors").is_file()


def test_a_device_that_is_full_says_what_would_fit(world, tmp_path, monkeypatch):
    """The last checkpoint stands, and the run goes on from it."""
    monkeypatch.setattr("embedcache.training.run.run.CHECKPOINT_SECONDS", 0.0)
    differentiate, calls = Stack.differentiate, []

    def full(self, work):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return differentiate(self, work)

    monkeypatch.setattr(Stack, "differentiate", full)
    config = replace(CONFIG, batch_tokens=256)
    said = r"out of memory at step 2 \(CUDA.*2\.00 GiB\)\. Type.*--memory"
    with pytest.raises(DeviceMemoryError, match=said):
        train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    result = train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert result.resumed_at_step == 2


def test_a_plan_that_does_not_hold_is_tried_with_smaller_parts(world, tmp_path, monkeypatch):
    take, tried = Loop._take, []

    def tight(self, everywhere):
        tried.append(self._stack.recipe.part_tokens)
        if tried[-1] == tried[0]:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ..."
            )
        return take(self, everywhere)

    plain = train(world.cache_path, out=tmp_path / "plain", config=CONFIG, device="cpu")
    monkeypatch.setattr(Loop, "_take", tight)
    flags = {"config": CONFIG, "device": "cpu", "memory": 12_000_000}
    result = train(world.cache_path, out=tmp_path / "c", **flags)
    assert 0 < tried[1] < tried[0]
    assert f"parts of {tried[1]:,} tokens" in result.memory
    assert result.best_dev == pytest.approx(plain.best_dev, rel=1e-3)
    rows = [
        json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if row["step"] == 0] == [0]
    # Not once something was learned, nor without a budget.
    tried.clear()

    def tight_later(self, everywhere):
        tried.append(self._stack.recipe.part_tokens)
        if len(tried) == 3:
            raise torch.OutOfMemoryError
        return take(self, everywhere)

    monkeypatch.setattr(Loop, "_take", tight_later)
    with pytest.raises(DeviceMemoryError, match="step 1"):
        train(world.cache_path, out=tmp_path / "d", **flags)
    assert len(tried) == 3
    monkeypatch.setattr(Loop, "_take", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(DeviceMemoryError):
        train(world.cache_path, out=tmp_path / "e", config=CONFIG, device="cpu")


def test_a_recipe_that_does_not_hold_gives_way_to_smaller_parts_and_then_to_the_next(
    world, monkeypatch
):
    materials = Materials(world.cache(), CPU, ALONE)
    config = replace(CONFIG, loss="exact")
    tried = []

    def holds(self, recipe, budget):
        tried.append((recipe.recompute, recipe.part_tokens))
        return recipe.recompute

    plan = plan_memory(materials, [config], "exact", 12_000_000)
    monkeypatch.setattr("embedcache.training.budget.planning._Trials.holds", holds)
    found = plan_memory(materials, [config], "exact", 12_000_000)
    assert not plan.recipe.recompute
    assert found.recipe.recompute
    assert tried[0] == (False, plan.part_tokens)
    assert 64 <= tried[-2][1] < plan.part_tokens  # the context's length at least
    assert [recompute for recompute, _ in tried] == [False] * (len(tried) - 1) + [True]
    smaller = plan.smaller(64)
    assert smaller is not None
    assert plan.expected - smaller.expected == pytest.approx(
        plan.per_token * (plan.part_tokens - smaller.part_tokens), abs=1
    )
    monkeypatch.setattr("embedcache.training.budget.planning._Trials.holds", lambda *given: False)
    with pytest.raises(DeviceMemoryError, match="--memory 13"):
        plan_memory(materials, [config], "exact", 12_000_000)
