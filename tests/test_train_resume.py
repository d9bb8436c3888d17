"""A run that is killed and run again ends with the weights of one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import World
from safetensors.torch import load_file

from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.store import CONFIG_FILE, WEIGHTS_FILE
from embedcache.train import train
from embedcache.training.checkpoint import CHECKPOINT
from embedcache.training.config import TrainConfig
from embedcache.training.metrics import METRICS_FILE

CONFIG = TrainConfig(
    carryon=CarryOnConfig(width=32, blocks=1), epochs=3, batch_tokens=256, lr=5e-3, samples=50
)

# Forks a child for each place of dying (torch is imported once); each child is killed by SIGKILL.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import embedcache.files as files
import embedcache.train as t
import embedcache.training.checkpoint as checkpoint
import embedcache.training.member as member
import embedcache.training.loop as loop
from embedcache.training.config import TrainConfig

member.CHECKPOINT_SECONDS = 0.0
cache, out, config = sys.argv[1], Path(sys.argv[2]), TrainConfig.from_dict(json.loads(sys.argv[3]))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after_save(step):
    save = member.save_checkpoint
    def saving(path, found, **more):
        save(path, found, **more)
        if found.state.step == step: die()
    member.save_checkpoint = saving

def in_save(number):
    publish, calls = checkpoint.publish_bytes, []
    def publishing(path, data):
        calls.append(path)
        if len(calls) == number:
            (path.parent / f".{path.name}.0123abcd.partial").write_bytes(data[:1000])
            die()
        publish(path, data)
    checkpoint.publish_bytes = publishing

def before_epoch_save():
    save = member.save_checkpoint
    def saving(path, found, **more):
        if found.state.position == 0: die()  # the epoch's row is written, its last step is saved
        save(path, found, **more)
    member.save_checkpoint = saving

def before_report():
    member.publish_report = lambda *given: die()

def before_weights():
    member.save_carryon = lambda *given: die()

for name in sys.argv[4:]:
    child = os.fork()
    if child == 0:
        eval(name)
        t.train(Path(cache), out=out / name, config=config, device="cpu")
        os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""
PLACES = {
    "in_save(1)": 0,
    "after_save(3)": 3,
    "in_save(6)": 5,
    "after_save(14)": 14,
    "before_epoch_save()": "epoch",
    "before_report()": None,
    "before_weights()": None,
}


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    result = train(world.cache_path, out=out, config=CONFIG, device="cpu")
    assert result.steps > 20
    return out, rows(out)


@pytest.fixture(scope="module")
def killed(world: World, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    settings = json.dumps(CONFIG.to_dict())
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(world.cache_path), str(folder), settings, *PLACES],
        check=True,
        timeout=120,
    )
    return folder


def rows(out: Path) -> list[dict]:
    """Metrics without what is measured in time."""
    found = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / WEIGHTS_FILE), load_file(second / WEIGHTS_FILE)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_weights(world, undisturbed, killed, place):
    out, expected = killed / place, PLACES[place]
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
    slow = DRIVER.split("def die")[0] + (
        "import time; step = loop.Loop._step\n"
        "loop.Loop._step = lambda *given: (time.sleep(0.05), step(*given))[1]\n"
        "t.train(Path(cache), out=out, config=config, device='cpu')\n"
    )
    out, draw, kills = tmp_path / "c", random.Random(0), 0
    command = [sys.executable, "-c", slow, str(world.cache_path), str(out)]
    while kills < 5 and not (out / CONFIG_FILE).exists():
        run = subprocess.Popen([*command, json.dumps(CONFIG.to_dict())])
        started = time.perf_counter()
        while not (out / CHECKPOINT).exists() and run.poll() is None:
            assert time.perf_counter() - started < 60
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6) if kills == 0 else draw.uniform(2, 4))
        if run.poll() is not None:
            assert run.returncode == 0
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills
    if not (out / WEIGHTS_FILE).exists():
        train(world.cache_path, out=out, config=CONFIG, device="cpu")
    assert same_weights(out, undisturbed[0])
