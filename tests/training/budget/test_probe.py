"""Plans as they are measured, and training that keeps within them."""

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
from embedcache.training.budget import probe
from embedcache.training.budget.allocator import peak_memory
from embedcache.training.budget.probe import plan_memory
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE
from embedcache.training.inputs import TrainingInputs
from embedcache.training.loop import Loop
from embedcache.training.step import cuda_graph
from embedcache.training.step.cuda_graph import GraphedStack
from embedcache.training.step.settings import PLAIN
from embedcache.training.step.stack import Stack
from embedcache.training.sweep import sweep
from embedcache.training.train import train
from embedcache.units import parse_bytes
from embedcache_cli.app import app

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=2), epochs=1, batch_tokens=1024, loss="exact"
)


@pytest.mark.parametrize("room", [True, False])
def test_a_plan_captures_parts_where_there_is_room(world, recording, monkeypatch, room):
    capture, tried = GraphedStack._capture, []

    def recorded(self, work):
        tried.append(1)
        if not room:
            raise torch.OutOfMemoryError
        return capture(self, work)

    monkeypatch.setattr(GraphedStack, "_capture", recorded)
    monkeypatch.setattr(cuda_graph, "capture", lambda part, *given, **more: (Mock(), part()))
    inputs = TrainingInputs(world.cache(), CPU, ALONE)
    plan = plan_memory(inputs, [CONFIG], "exact", 12_000_000)
    assert tried
    assert plan.settings.cuda_graph is room


def test_carry_ons_with_batches_of_their_own_or_too_many_are_not_captured(
    world, recording, monkeypatch
):
    monkeypatch.setattr(cuda_graph, "capture", lambda part, *given, **more: (Mock(), part()))
    for module in (cuda_graph, probe):
        monkeypatch.setattr(module, "MOST", 2)
    inputs = TrainingInputs(world.cache(), CPU, ALONE)
    for seeds, order, captured in ((2, 0, True), (2, None, False), (3, 0, False)):
        configs = [replace(CONFIG, seed=seed, order_seed=order) for seed in range(seeds)]
        plan = plan_memory(inputs, configs, "exact", 50_000_000)
        assert plan.settings.cuda_graph is captured


def test_nothing_is_probed_where_weights_and_head_alone_exceed_the_budget(world, monkeypatch):
    """But for the least budget that would do."""
    tried, measured = [], probe._Probe._measured

    def noted(self, settings):
        tried.append(settings.part_tokens)
        return measured(self, settings)

    monkeypatch.setattr(probe._Probe, "_measured", noted)
    inputs = TrainingInputs(world.cache(), CPU, ALONE)
    weights = Branch(CONFIG.carryon, 32).parameter_count()
    head = inputs.frozen(CONFIG.carryon, PLAIN, training=True).head.weight_VH.nbytes
    with pytest.raises(DeviceMemoryError, match="at least"):
        plan_memory(inputs, [CONFIG], "exact", head + 16 * weights - 1)
    assert tried == [64, 64]  # without a limit, and within what was found


@pytest.mark.parametrize("loss", [pytest.param("exact", marks=pytest.mark.slow), "shortlist"])
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
            with peak_memory(CPU, held) as peak:
                loss_K = differentiate(self, work)
            peaks[budget].append(peak[0])
            planned.append((budget, self.settings.part_tokens))
            return loss_K

        monkeypatch.setattr(Stack, "differentiate", measured)
        out = tmp_path / str(budget)
        train(world.cache_path, out=out, config=config, device="cpu", memory=budget)
        assert 0.2 * budget < max(peaks[budget]) < budget
    parts = dict(planned)
    assert parts[3_000_000] < parts[12_000_000]


def test_a_sweep_keeps_within_its_budget(world, tmp_path):
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    results = sweep(world.cache_path, runs=runs, device="cpu", memory=8_000_000)
    assert all(result.failure is None for result in results)


def test_a_sweep_that_does_not_fit_is_trained_in_halves(world, tmp_path, monkeypatch):
    planned, sizes = trainer.plan_memory, []

    def one_alone(inputs, configs, loss, budget):
        sizes.append(len(configs))
        if len(configs) > 1:
            raise DeviceMemoryError("too many")
        return planned(inputs, configs, loss, budget)

    monkeypatch.setattr(trainer, "plan_memory", one_alone)
    runs = {tmp_path / str(seed): replace(CONFIG, seed=seed) for seed in range(3)}
    results = sweep(world.cache_path, runs=runs, device="cpu", memory=200_000_000)
    assert all(result.summary is not None for result in results)
    assert sizes == [3, 1, 2, 1, 1]


def test_a_budget_that_holds_no_sequence_is_refused_with_the_least_that_does(world, tmp_path):
    with pytest.raises(DeviceMemoryError, match="a sequence of 64 tokens") as refused:
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu", memory=200_000)
    least = parse_bytes(str(refused.value).split('"')[-2])
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
