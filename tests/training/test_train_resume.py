"""A run that is killed and run again ends with the weights of one that was not."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import World
from safetensors.torch import load_file
from support.forked import FORKS, die, run_forked

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.saving import CONFIG_FILE, WEIGHTS_FILE
from embedcache.training import loop
from embedcache.training.config import TrainConfig
from embedcache.training.run import checkpoint
from embedcache.training.run import run as member
from embedcache.training.run.checkpoint import CHECKPOINT
from embedcache.training.run.metrics import METRICS_FILE
from embedcache.training.train import train

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=1), epochs=3, batch_tokens=256, lr=5e-3, samples=50
)


def after_save(step: int) -> None:
    save = member.save_checkpoint

    def saving(path, found, **more):
        save(path, found, **more)
        if found.state.step == step:
            die()

    member.save_checkpoint = saving


def in_save(number: int) -> None:
    publish, calls = checkpoint.publish_bytes, []

    def publishing(path, data):
        calls.append(path)
        if len(calls) == number:
            (path.parent / f".{path.name}.0123abcd.partial").write_bytes(data[:1000])
            die()
        publish(path, data)

    checkpoint.publish_bytes = publishing


def before_epoch_save() -> None:
    save = member.save_checkpoint

    def saving(path, found, **more):
        if found.state.position == 0:
            die()  # the epoch's row is written, its last step is saved
        save(path, found, **more)

    member.save_checkpoint = saving


def before_report() -> None:
    member.publish_report = die


def before_weights() -> None:
    member.save_carryon = die


PLACES = {
    "in_save(1)": 0,
    "after_save(3)": 3,
    "in_save(6)": 5,
    "after_save(14)": 14,
    "before_epoch_save()": "epoch",
    "before_report()": None,
    "before_weights()": None,
}


def train_until(place: str, cache: Path, out: Path) -> None:
    """Train, saving after each step, and die at one of `PLACES`: a process's target."""
    member.CHECKPOINT_SECONDS = 0.0
    eval(place)
    train(cache, out=out, config=CONFIG, device="cpu")


def train_slowly(cache: Path, out: Path) -> None:
    """Train with a pause before each step, saving after it: a process's target."""
    member.CHECKPOINT_SECONDS = 0.0
    step = loop.Loop._step

    def slow(self):
        time.sleep(0.05)
        step(self)

    loop.Loop._step = slow
    train(cache, out=out, config=CONFIG, device="cpu")


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    result = train(world.cache_path, out=out, config=CONFIG, device="cpu")
    assert result.steps > 20
    return out, rows(out)


def rows(out: Path) -> list[dict]:
    """Metrics without what is measured in time."""
    found = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / WEIGHTS_FILE), load_file(second / WEIGHTS_FILE)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_weights(world, undisturbed, tmp_path, place):
    out, expected = tmp_path / "c", PLACES[place]
    assert run_forked(train_until, place, world.cache_path, out) == -signal.SIGKILL
    assert not (out / WEIGHTS_FILE).exists()
    result = train(world.cache_path, out=out, config=CONFIG, device="cpu")
    first_epoch = next(row["step"] for row in undisturbed[1] if "train_loss" in row)
    steps = {None: result.steps, "epoch": first_epoch}
    assert result.resumed_at_step == steps.get(expected, expected)
    assert same_weights(out, undisturbed[0])
    assert rows(out) == undisturbed[1]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in undisturbed[0].iterdir())


def test_the_comparison_can_fail(world, undisturbed, tmp_path):
    train(world.cache_path, out=tmp_path / "c", config=replace(CONFIG, seed=1), device="cpu")
    assert not same_weights(tmp_path / "c", undisturbed[0])


@pytest.mark.slow
def test_killed_at_any_time_again_and_again(world, undisturbed, tmp_path):
    out, draw, kills = tmp_path / "c", random.Random(0), 0
    while kills < 5 and not (out / CONFIG_FILE).exists():
        run = FORKS.Process(target=train_slowly, args=(world.cache_path, out), daemon=True)
        run.start()
        started = time.perf_counter()
        while not (out / CHECKPOINT).exists() and run.is_alive():
            assert time.perf_counter() - started < 60
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        if not run.is_alive():
            assert run.exitcode == 0
            break
        run.kill()
        run.join()
        kills += 1
    assert kills > 1
    if not (out / WEIGHTS_FILE).exists():
        train(world.cache_path, out=out, config=CONFIG, device="cpu")
    assert same_weights(out, undisturbed[0])
