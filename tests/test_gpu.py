"""Both stages on a GPU: every codec, one carry-on and several stacked."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_world

from embedcache.cache.verify import verify
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.nn.attention import Spans, attend, segment_mask
from embedcache.data.loader import BatchLoader
from embedcache.device import free_memory
from embedcache.evaluation.evaluate import evaluate
from embedcache.training import trainer
from embedcache.training.config import TrainConfig
from embedcache.training.step.settings import PLAIN, Recipe
from embedcache.training.step.stack import Stack
from embedcache.training.step.timestamps import Mark
from embedcache.training.train import sweep, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codec", ["bf16", "int8", "transform"])
def test_a_gpu_extracts_trains_and_evaluates_with_every_codec(tmp_path, codec):
    world = make_world(tmp_path / "gpu", codec=codec, documents=48, device="cuda")
    on_cpu = make_world(tmp_path / "cpu", documents=48)
    assert not verify(world.cache_path, deep=True).faults
    for split in ("dev", "train"):
        ours, exact = (one.cache().split(split).block(0, None) for one in (world, on_cpu))
        x, reference = ours.x_NH["final"].float(), exact.x_NH["final"].float()
        error = (x - reference).norm() / reference.norm()
        assert error < (0.05 if split == "dev" or codec == "bf16" else 0.5)
    config = TrainConfig(carryon=BranchConfig(width=32), epochs=2, loss="exact")
    summary = train(world.cache_path, out=tmp_path / "one", config=config, device="cuda")
    assert summary.best_dev is not None and summary.base_dev is not None
    assert summary.best_dev < summary.base_dev
    found = evaluate(tmp_path / "one", world.cache_path, device="cuda")
    host = evaluate(tmp_path / "one", world.cache_path, device="cpu")
    assert found.rows[0]["cross_entropy"] == pytest.approx(host.rows[0]["cross_entropy"], rel=0.01)


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_those_stacked_on_a_gpu_come_to_what_each_does_alone(tmp_path, world, loss):
    runs = {
        tmp_path / str(seed): TrainConfig(
            carryon=BranchConfig(width=32), epochs=2, seed=seed, loss=loss
        )
        for seed in range(3)
    }
    stacked = sweep(world.cache_path, runs=runs, device="cuda")
    for seed, result in enumerate(stacked):
        out = tmp_path / f"alone{seed}"
        alone = train(world.cache_path, out=out, config=result.config, device="cuda")
        assert result.failure is None and result.summary is not None
        assert result.summary.best_dev == pytest.approx(alone.best_dev, rel=2e-3)


def test_spans_on_a_gpu_are_the_mask_they_stand_for():
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(3, 1, 300, 2, 32, generator=draw, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    lengths = torch.tensor([100, 1, 59, 140, 0])
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda()
    segments = torch.repeat_interleave(torch.arange(5), lengths)[None].cuda()
    parts = [part.requires_grad_() for part in (q, k, v)]
    upstream = torch.randn_like(q)
    found = attend(*parts, Spans(starts, 140))
    expected = attend(*parts, segment_mask(segments))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for one, other in zip(
        torch.autograd.grad(found, parts, upstream),
        torch.autograd.grad(expected, parts, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("part_tokens", [None, 80])
def test_batches_of_several_epochs_are_those_of_a_cpu(world, part_tokens):
    split, before = world.cache().split("train"), set(threading.enumerate())
    settings = {
        "batch_tokens": 200,
        "taps": ("final",),
        "one_row": True,
        "part_tokens": part_tokens,
    }
    found = []
    for device in ("cpu", "cuda"):
        loader = BatchLoader(split, device=torch.device(device), **settings)
        batches = loader.epochs(range(1, 4), skip=3)
        found.append([])
        for batch in batches:
            found[-1].append(None)
            if batch is not None:
                tensors = [tensor.cpu() for tensor in batch.tensors()]
                found[-1][-1] = (batch.sequences, batch.last_part, tensors)
    assert [one is None for one in found[0]].count(True) == 3
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one[:2] == other[:2]
            assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(("part_tokens", "made"), [(None, 2), (80, 0)])
def test_the_next_epoch_waits_on_the_device_unless_memory_is_short(world, part_tokens, made):
    prepared = []
    loader = BatchLoader(
        world.cache().split("train"),
        batch_tokens=200,
        taps=("final",),
        device=torch.device("cuda"),
        part_tokens=part_tokens,
    )
    batches = loader.epochs(range(2), prepare=lambda batch: prepared.append(batch) or batch)
    count = sum(1 for _ in iter(partial(next, batches), None))
    stop = time.perf_counter() + 5
    while len(prepared) < count + made and time.perf_counter() < stop:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(prepared) == count + made
    batches.close()


RECIPES = {
    "one row": Recipe(one_row=True),
    "captured": Recipe(one_row=True, capture=True),
    "parts": Recipe(part_tokens=128, one_row=True, capture=True),
    "lean": Recipe(
        part_tokens=128,
        offload=True,
        host_head=True,
        recompute=True,
        emitted=128,
        ahead=1,
        one_row=True,
        capture=True,
    ),
}


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_learns_the_same_by_every_recipe(tmp_path, world, monkeypatch, name, loss):
    config = TrainConfig(
        carryon=BranchConfig(width=32), epochs=3, loss=loss, samples=100, batch_tokens=512
    )
    found = {}
    for recipe in (PLAIN, RECIPES[name]):
        monkeypatch.setattr(trainer, "plain_recipe", lambda *given, recipe=recipe: recipe)
        runs = {
            tmp_path / str(recipe) / str(s): replace(config, seed=s, order_seed=0) for s in (0, 1)
        }
        found[recipe] = sweep(world.cache_path, runs=runs, device="cuda")
    for plain, other in zip(*found.values(), strict=True):
        assert plain.summary is not None and other.summary is not None, other.failure
        gain = plain.summary.base_dev - plain.summary.best_dev
        assert gain > 0
        assert plain.summary.base_dev - other.summary.best_dev == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_a_gpu_without_room_for_recordings_trains_without(tmp_path, world, monkeypatch, loss):
    """Memory runs out while a part is recorded, the first one or a later one."""
    config = TrainConfig(
        carryon=BranchConfig(width=32), epochs=2, loss=loss, samples=100, batch_tokens=512
    )
    recipe = Recipe(one_row=True, capture=True)
    monkeypatch.setattr(trainer, "plain_recipe", lambda *given: recipe)
    expected = train(world.cache_path, out=tmp_path / "plain", config=config, device="cuda")
    differentiate, recorded = Stack.differentiate, []
    for allowed in (0, 1):
        recorded.clear()

        def short(self, work, allowed=allowed):
            if torch.cuda.is_current_stream_capturing():
                recorded.append(1)
                if len(recorded) > allowed:
                    torch.empty(1 << 40, device="cuda")
            return differentiate(self, work)

        monkeypatch.setattr(Stack, "differentiate", short)
        out = tmp_path / str(allowed)
        found = train(world.cache_path, out=out, config=config, device="cuda")
        assert recorded
        assert found.best_dev == pytest.approx(expected.best_dev, rel=2e-3)


WITHIN = """
import sys, torch
from pathlib import Path
from embedcache.carryon.branch.config import BranchConfig
from embedcache.training.train import train
from embedcache.training.config import TrainConfig
cache, out, loss, budget = sys.argv[1:]
shape = BranchConfig(width=64)
config = TrainConfig(carryon=shape, epochs=1, loss=loss, batch_tokens=2048)
summary = train(Path(cache), out=Path(out), config=config, device="cuda", memory=int(budget))
assert summary.memory is not None
segments = torch.cuda.memory_snapshot()
kinds = [one["is_expandable"] for one in segments if one["segment_pool_id"] == (0, 0)]
assert kinds and all(kinds)
print(torch.cuda.max_memory_reserved())
"""


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_a_gpu_s_allocator_keeps_within_the_budget(tmp_path, world, loss):
    budget = 100_000_000  # of which libraries take some for each stream
    # A process of its own: what others left of such reserves would count.
    command = [sys.executable, "-c", WITHIN, str(world.cache_path), str(tmp_path / "c"), loss]
    done = subprocess.run([*command, str(budget)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) <= budget


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # nothing was, on that thread
def test_the_gradient_of_a_bias_takes_little_memory():
    """Torch's sum takes several times what it sums, where that is few rows."""
    carryon = Branch.stack([Branch(BranchConfig(width=256, blocks=1), 64)]).cuda()
    up = carryon.blocks[0].up
    x = torch.randn(1, 1, 1024, 256, device="cuda")
    upstream = torch.randn(1, 1, 1024, 1024, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = up(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(upstream.bfloat16())
    assert torch.cuda.max_memory_allocated() - before < 2 * upstream.nbytes
    torch.testing.assert_close(up.bias.grad, upstream.sum(dim=(1, 2)), rtol=0.02, atol=0.5)


PIECES = """
import torch
from embedcache.training.step.cuda_graph import record
from embedcache.carryon.branch.model import Branch
from embedcache.training.budget.allocator import spare_reserves
spare_reserves()

def part():
    few = [torch.ones(size << 20, dtype=torch.uint8, device="cuda") for size in (14, 20, 30)]
    first = sum(one[0] for one in few)
    del few
    return first + torch.ones(60 << 20, dtype=torch.uint8, device="cuda")[0]

graph, made = record(part, torch.device("cuda:0"), None, whole=True)
graph.replay()
assert made.item() == 4
segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == graph.pool()]
print(sum(segment["total_size"] for segment in segments if segment["segment_type"] == "large"))
"""


def test_a_recording_takes_its_memory_in_one_piece():
    command = [sys.executable, "-c", PIECES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 60 << 20 <= int(done.stdout) <= 80 << 20  # piece by piece 124 MiB


def test_waits_count_while_a_gpu_has_no_work():
    device, busy = torch.device("cuda:0"), torch.ones(1 << 28, device="cuda")
    found = []
    for rounds in (1, 400):  # of about a millisecond
        torch.cuda.synchronize()
        for _ in range(rounds):
            busy.mul_(1.0)
        before = Mark(device)
        time.sleep(0.1)
        found.append((before, Mark(device)))
    torch.cuda.synchronize()
    idle, working = (before.until(after) for before, after in found)
    assert 0.08 < idle < 0.2 and working < 0.02


def test_what_torch_keeps_unused_of_a_gpu_is_free():
    torch.cuda.empty_cache()
    before = free_memory(torch.device("cuda:0"))
    kept = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert before - free_memory(torch.device("cuda:0")) >= 1 << 30
    del kept
    assert abs(before - free_memory(torch.device("cuda:0"))) < 1 << 26
