"""However a step is computed, the same is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import World
from support.carryons import change_at

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.saving import load_carryon
from embedcache.data import packing
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.loss.shortlist import sampler as sampler_module
from embedcache.training import inputs as materials
from embedcache.training.budget.memory import MemoryPlan
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE
from embedcache.training.inputs import Materials
from embedcache.training.loop import Loop
from embedcache.training.step.settings import PLAIN, Recipe
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs
from embedcache.training.train import sweep, train
from embedcache.training.trainer import Trainer

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=2), epochs=2, batch_tokens=256, lr=5e-3, loss="exact"
)


LOW = Recipe(offload=True, part_tokens=64)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(materials, "fast_dtype", lambda device: torch.float32)


def planned_by(monkeypatch, recipe: Recipe) -> None:
    plan = MemoryPlan(recipe=recipe, budget=1, expected=1)

    def planned(self, members):
        return [(stack, plan) for stack in self.stacks(members)]

    monkeypatch.setattr(Trainer, "planned", planned)


def trained(world: World, out, monkeypatch, recipe: Recipe, config: TrainConfig = CONFIG):
    recipe = replace(recipe, part_tokens=recipe.part_tokens or 256)
    planned_by(monkeypatch, recipe)
    summary = train(world.cache_path, out=out, config=config, device="cpu")
    return summary, load_carryon(out)[0].state_dict()


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        (Recipe(part_tokens=64), 1e-3),
        (Recipe(part_tokens=1), 1e-3),
        (Recipe(recompute=True), 0.0),
        (Recipe(host_head=True, ahead=1), 0.0),
        (Recipe(logit_bytes=1 << 19), 1e-3),
        (Recipe(emitted=48), 1e-3),
    ],
    ids=["parts", "sequences", "recompute", "host head", "few logits", "few deltas"],
)
def test_a_recipe_changes_nothing_that_is_learned(world, tmp_path, monkeypatch, recipe, tolerance):
    _, expected = trained(world, tmp_path / "plain", monkeypatch, PLAIN)
    summary, found = trained(world, tmp_path / "other", monkeypatch, recipe)
    assert summary.steps == 2 * -(-world.cache().split("train").manifest.tokens // 256)
    start = Branch(CONFIG.carryon, 32)
    for name, value in expected.items():
        if not tolerance:
            assert torch.equal(found[name], value), name
            continue
        moved = (value - start.state_dict()[name]).norm().clamp_min(1e-3)
        assert (found[name] - value).norm() <= tolerance * moved, name


def test_bfloat16_weights_learn_about_the_same(world, tmp_path, monkeypatch):
    plain, _ = trained(world, tmp_path / "plain", monkeypatch, PLAIN)
    summary, found = trained(world, tmp_path / "low", monkeypatch, LOW)
    assert summary.base_dev - summary.best_dev > 0.9 * (plain.base_dev - plain.best_dev)
    assert all(value.dtype == torch.float32 for value in found.values())


def test_parts_are_what_is_on_the_device_at_a_time(world, tmp_path, monkeypatch):
    seen, parts = [], []
    begin, differentiate, finish = Stack.begin, Stack.differentiate, Stack.finish

    def noted(self, work):
        seen.append((work[0].inputs.batch.tokens, work[0].inputs.batch.last_part))
        parts[-1] += 1
        return differentiate(self, work)

    def finished(self, loss_K):
        assert parts[-1] > 0 and seen[-1][1]
        return finish(self, loss_K)

    monkeypatch.setattr(Stack, "differentiate", noted)
    monkeypatch.setattr(Stack, "begin", lambda self, work: (parts.append(0), begin(self, work)))
    monkeypatch.setattr(Stack, "finish", finished)
    trained(world, tmp_path / "c", monkeypatch, Recipe(part_tokens=80))
    assert max(tokens for tokens, _ in seen) <= 80
    assert len(seen) > 2 * len(parts)
    assert sum(last for _, last in seen) == len(parts)
    assert sum(tokens for tokens, _ in seen) == (2 * world.cache().split("train").manifest.tokens)


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_stacked_ones_of_different_steps_take_as_many_parts_as_each_needs(
    world, tmp_path, monkeypatch, loss
):
    """One of 256 tokens a step has four times the parts of one of 64."""
    planned_by(monkeypatch, Recipe(part_tokens=64))
    runs = {
        "a": replace(CONFIG, batch_tokens=256, seed=1, loss=loss, samples=50),
        "b": replace(CONFIG, batch_tokens=64, seed=2, loss=loss, samples=50),
        "c": replace(CONFIG, documents=("*1*",), seed=3, loss=loss, samples=50),
    }
    results = sweep(
        world.cache_path, runs={tmp_path / name: run for name, run in runs.items()}, device="cpu"
    )
    assert all(result.failure is None for result in results)
    for name, config in runs.items():
        alone = tmp_path / f"{name}-alone"
        train(world.cache_path, out=alone, config=config, device="cpu")
        expected, found = (
            load_carryon(folder)[0].state_dict() for folder in (alone, tmp_path / name)
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-4)


def interrupted(world: World, out, monkeypatch, recipe: Recipe) -> None:
    """Train for five steps, and save."""
    stop, steps = Loop._step, []

    def stopping(self):
        steps.append(1)
        if len(steps) == 6:
            self._read()
            for member in (m for feed in self._feeds for m in feed.members):
                member.save(self._stack, 0)
            raise KeyboardInterrupt
        stop(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(world, out, monkeypatch, recipe)


def test_a_run_goes_on_by_another_recipe(world, tmp_path, monkeypatch):
    interrupted(world, tmp_path / "c", monkeypatch, LOW)
    summary, _ = trained(world, tmp_path / "c", monkeypatch, PLAIN)
    assert summary.resumed_at_step == 5
    plain, _ = trained(world, tmp_path / "plain", monkeypatch, PLAIN)
    assert summary.best_dev == pytest.approx(plain.best_dev, rel=5e-3)


def test_a_run_whose_states_are_on_the_host_goes_on_as_if_it_had_not_stopped(
    world, tmp_path, monkeypatch
):
    """A checkpoint has all that is in 16 bits, and all of each weight."""
    interrupted(world, tmp_path / "c", monkeypatch, LOW)
    summary, found = trained(world, tmp_path / "c", monkeypatch, LOW)
    assert summary.resumed_at_step == 5
    _, expected = trained(world, tmp_path / "whole", monkeypatch, LOW)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_batch_of_one_row_is_that_of_several(world, monkeypatch):
    monkeypatch.setattr(packing, "CU_SEQLENS_MULTIPLE", 4)
    split = world.cache().split("train")
    model = Branch(BranchConfig(width=32, blocks=2), 32)
    torch.nn.init.normal_(model.branch.weight)
    inputs = FrozenInputs(world.cache(), torch.device("cpu"))
    several, one = (
        BatchLoader(split, batch_tokens=300, taps=("final",), one_row=one_row).epoch(0)
        for one_row in (False, True)
    )
    for expected, found in zip(several, one, strict=True):
        assert found.ids_BT.shape == (1, 300)
        assert len(found.cu_seqlens_M) % 4 == 0
        assert found.cu_seqlens_M.dtype == torch.int32
        # Padding comes in pieces, none longer than the longest sequence.
        assert found.cu_seqlens_M[-1] == 300
        assert found.cu_seqlens_M.diff().max() == found.positions_BT.max() + 1
        assert sorted(found.targets_N.tolist()) == sorted(expected.targets_N.tolist())
        places = [
            {tuple(place): row for row, place in enumerate(batch.source_N2.tolist())}
            for batch in (expected, found)
        ]
        delta = [change_at(model, batch, inputs) for batch in (expected, found)]
        rows = [places[0][place] for place in places[1]]
        torch.testing.assert_close(delta[1], delta[0][rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.targets_N, expected.targets_N[rows])


@pytest.mark.parametrize("emitted", [1, 100, 1000])
def test_deltas_of_some_positions_at_a_time_make_the_same_shortlist_loss(
    world, monkeypatch, emitted
):
    """Of carry-ons with batches of their own, in lists of 50 positions."""
    monkeypatch.setitem(sampler_module.POSITIONS, "cpu", 50)
    materials = Materials(world.cache(), torch.device("cpu"), ALONE)
    configs = [replace(CONFIG, loss="shortlist", samples=30, order_seed=seed) for seed in (0, 1)]
    found = []
    for recipe in (PLAIN, Recipe(emitted=emitted)):
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(Branch(CONFIG.carryon, 32))
        for model in models:  # zero, it would have gradients of one layer only
            torch.nn.init.normal_(model.branch.weight, std=0.02)
        inputs = materials.inputs(CONFIG.carryon, recipe, training=True)
        stack = Stack(models, configs, inputs, recipe)
        work = []
        for config in configs:
            shortlist = materials.shortlist(config, recipe)
            loader = materials.train_loader(config, replace(recipe, part_tokens=200))
            batch = next(loader.epoch(0))
            part = StepInputs(batch, shortlist.draw(batch.targets_N, shortlist.generator(3)))
            work.append(Work(inputs=part, targets=len(batch.targets_N), rate=1.0))
        assert len(work[0].inputs.shortlists) > 1
        stack.begin(work)
        found.append((stack.differentiate(work), stack.optimizer.gradient_KP.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
