"""Recorded steps against the same ones taken each for itself. CUDA's own recording: `test_gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import World

from embedcache.cache import packing
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.model import CarryOn
from embedcache.training import captured, materials
from embedcache.training.captured import Captured
from embedcache.training.config import TrainConfig
from embedcache.training.ranks import ALONE
from embedcache.training.recipe import PLAIN
from embedcache.training.stack import Stack, Work

CPU = torch.device("cpu")
CONFIG = TrainConfig(carryon=CarryOnConfig(width=32, blocks=1), batch_tokens=200, samples=30)


class Replayed:
    """What a graph does, on a CPU: the same step into the same results."""

    def __init__(self, step, made):
        self.step, self.made, self.replays = step, made, 0

    def replay(self):
        self.replays += 1
        for kept, found in zip(self.made, self.step(), strict=True):
            kept.copy_(found)

    def pool(self):
        return None


@pytest.fixture
def stacks(world: World, monkeypatch):
    """Two equal stacks of two, and batches of one row."""
    monkeypatch.setattr(packing, "STARTS", 8)
    monkeypatch.setattr(captured, "POSITIONS", 128)
    monkeypatch.setattr(captured, "COLUMNS", 384)  # shortlists have 256
    monkeypatch.setattr(materials, "fast_dtype", lambda device: torch.float32)
    graphs = []

    def record(step, device, pool):
        step()
        made = step()
        graphs.append(Replayed(step, made))
        return graphs[-1], made

    monkeypatch.setattr(captured, "record", record)

    def make(loss: str):
        shared = materials.Materials(world.cache(), CPU, ALONE)
        configs = [replace(CONFIG, seed=seed, lr=5e-3 * (seed + 1)) for seed in range(2)]
        models = []
        for config in configs:
            torch.manual_seed(config.seed)
            model = CarryOn(config.carryon, 32)
            torch.nn.init.normal_(model.branch.weight, std=0.1)
            models.append(model)
        inputs = shared.inputs(CONFIG.carryon, PLAIN, training=True)
        loader = shared.train_loader(CONFIG, PLAIN)
        loader._row_tokens = 200
        shortlist = shared.shortlist(CONFIG, PLAIN) if loss == "shortlist" else None

        def draw(batch):
            return (
                [] if shortlist is None else shortlist.draw(batch.targets_N, shortlist.generator(1))
            )

        batches = list(loader.epoch(0, draw=draw))
        return [Stack(models, configs, inputs) for _ in range(2)], batches

    return make, graphs


def scheduled(stack: Stack, batch, step: int) -> list[Work]:
    targets = batch.whole.targets
    work = [Work(batch=batch, targets=targets, rate=1e-3 * (step + 1) * (k + 1)) for k in range(2)]
    stack.schedule(work)
    return work


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_recorded_steps_are_those_taken_alone(stacks, loss):
    make, graphs = stacks
    (plain, recorded), batches = make(loss)
    recorder = Captured(recorded, CPU)
    for step, batch in enumerate(batches * 2):
        expected = plain.finish(plain.differentiate(scheduled(plain, batch, step)))
        found = recorder.take(scheduled(recorded, batch, step))
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        recorded.optimizer.values_KP, plain.optimizer.values_KP, rtol=1e-3, atol=1e-5
    )
    # Few shapes, each recorded once, and most steps were replays of one that was there.
    assert sum(graph.replays for graph in graphs) == 2 * len(batches)
    assert len(graphs) == len({captured.shape_of(batch) for batch in batches}) < len(batches)
    moments = [stack.optimizer.moments(0)["step"] for stack in (plain, recorded)]
    assert moments == [2 * len(batches)] * 2


def test_a_batch_that_is_no_number_moves_nobody_that_sees_it(stacks):
    make, _ = stacks
    (_, recorded), batches = make("exact")
    recorder = Captured(recorded, CPU)
    recorder.take(scheduled(recorded, batches[0], 0))
    before = recorded.optimizer.values_KP.clone()
    recorded.model.branch.bias.data[1] = torch.nan
    before[1] = recorded.optimizer.values_KP[1]
    loss_K, _ = recorder.take(scheduled(recorded, batches[1], 1))
    assert loss_K.isfinite().tolist() == [True, False]
    assert not torch.equal(recorded.optimizer.values_KP[0], before[0])
    torch.testing.assert_close(recorded.optimizer.values_KP[1], before[1], equal_nan=True)
    assert [int(recorded.optimizer.moments(k)["step"]) for k in range(2)] == [2, 1]


def test_what_cannot_be_recorded_is_left_to_others(stacks, monkeypatch):
    make, graphs = stacks
    (_, recorded), batches = make("exact")
    recorder = Captured(recorded, CPU)
    part = replace(batches[0], whole=batches[0].whole._replace(tokens=1000))
    rows = replace(batches[0], starts_M=None)
    for batch in (part, rows, replace(batches[0], last=False)):
        assert recorder.take(scheduled(recorded, batch, 0)) is None
    other = replace(batches[0])
    work = scheduled(recorded, batches[0], 0)
    assert recorder.take([work[0], replace(work[1], batch=other)]) is None
    monkeypatch.setattr(captured, "SHAPES", 0)
    assert recorder.take(work) is None
    assert not graphs
