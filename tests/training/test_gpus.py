"""Several GPUs of one machine under ``torchrun``: NCCL between devices, gloo between hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedcache.carryon.branch.config import BranchConfig
from embedcache.evaluation.evaluate import evaluate
from embedcache.training.config import TrainConfig
from embedcache.training.run.run import TrainSummary
from embedcache.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32), epochs=3, batch_tokens=512, loss="exact", samples=100
)
FLAGS = ["--width", "32", "--epochs", "3", "--batch-tokens", "512", "--device", "cuda", "--json"]


FULL = """
import errno, os, sys
from embedcache.training.run import run as member
from embedcache_cli.app import main

def no_space(*given, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

if os.environ["RANK"] == "0":
    member.save_checkpoint = no_space
main()
"""


def torchrun(
    *arguments: object, script: str = "", fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes, or what a script makes of it."""
    program = ["--no-python", sys.executable, "-c", script] if script else ["-m", "embedcache_cli"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *program),
            *map(str, arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bool(done.returncode) == fails, done.stderr
    return done


def gain(summary: TrainSummary) -> float:
    assert summary.base_dev is not None and summary.best_dev is not None
    return summary.base_dev - summary.best_dev


@pytest.mark.parametrize("flags", [[], ["--memory", "100MB"]], ids=["plain", "within a budget"])
@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_two_gpus_learn_what_one_does(world, tmp_path, loss, flags):
    found = torchrun(
        *("train", world.cache_path, "--out", tmp_path / "two", "--loss", loss), *flags, *FLAGS
    )
    two = TrainSummary(**json.loads(found.stdout))
    config = replace(CONFIG, loss=loss)
    one = train(world.cache_path, out=tmp_path / "one", config=config, device="cuda")
    # Batches of half as many tokens are cut elsewhere: the same steps but for a few sequences.
    assert two.base_dev == pytest.approx(one.base_dev, abs=1e-5)
    assert gain(two) == pytest.approx(gain(one), rel=0.25) and gain(one) > 0.05
    exact = evaluate(tmp_path / "two", world.cache_path, split="dev", device="cuda").rows[0]
    assert two.best_dev == pytest.approx(exact["cross_entropy"], abs=1e-4)


def test_a_sweep_is_spread_over_two_gpus(world, tmp_path):
    (tmp_path / "s.toml").write_text("order_seed = 0\n[grid]\nseed = [0, 1, 2, 3, 4]")
    found = torchrun(
        *("train", world.cache_path, "--out", tmp_path / "all"),
        *("--sweep", tmp_path / "s.toml", "--loss", "exact", *FLAGS),
    )
    rows = {row["name"]: row for row in json.loads(found.stdout)}
    assert len(rows) == 5
    for seed in range(5):
        config = replace(CONFIG, seed=seed, order_seed=0)
        alone = train(world.cache_path, out=tmp_path / str(seed), config=config, device="cuda")
        dev = rows[f"seed={seed}"]["results"]["best_dev"]
        assert dev == pytest.approx(alone.best_dev, rel=2e-3)


def test_what_fails_ends_both_processes(world, tmp_path):
    out: Path = tmp_path / "c"
    found = torchrun("train", world.cache_path, "--out", out, *FLAGS, "--lr", "1e30", fails=True)
    assert "training stopped at step" in found.stderr


def test_what_fails_in_the_leading_process_alone_ends_both(world, tmp_path):
    out: Path = tmp_path / "c"
    found = torchrun("train", world.cache_path, "--out", out, *FLAGS, script=FULL, fails=True)
    assert "No space left" in found.stderr
    assert not (out / "carryon.safetensors").exists()
