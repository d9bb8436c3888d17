"""Several processes under ``torchrun``, over gloo, against loops in one process."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import World
from support.carryons import change_at
from support.forked import ForkedCommand, exit_code, started

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.protocol import CarryOn, InputStats
from embedcache.carryon.saving import load_carryon
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.data.sample import sample_embeddings
from embedcache.device import fast_dtype
from embedcache.evaluation.evaluate import evaluate
from embedcache.loss import linear_cross_entropy
from embedcache.training.config import TrainConfig
from embedcache.training.optim.schedule import learning_rate
from embedcache.training.run import run as member
from embedcache.training.train import train

CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=1), epochs=2, batch_tokens=256, lr=5e-3, loss="exact"
)
FLAGS = [
    "--width",
    "32",
    "--blocks",
    "1",
    "--epochs",
    "2",
    "--batch-tokens",
    "256",
    "--lr",
    "5e-3",
    "--loss",
    "exact",
]


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "embedcache_cli"),
            *map(str, arguments),
            *("--device", "cpu"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def ranks_environment(rank: int, port: int) -> dict[str, str]:
    """Return what ``torchrun`` tells a process of two."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return here | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def forked_ranks(*arguments: object) -> list[tuple[int | None, str, str]]:
    """Run the command in two processes as ``torchrun`` starts them: exit codes, and what is said.

    They import nothing anew. That ``torchrun`` starts them so, another test shows.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    ranks = [
        ForkedCommand(
            *map(str, arguments),
            *("--device", "cpu"),
            environment=ranks_environment(rank, port),
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate() for process in ranks]
    finally:
        for process in ranks:  # where one has failed, the other waits for it
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]


def reference(world: World, ranks: int) -> CarryOn:
    """Train by hand: each step is over the batches of all processes, weighted by their targets."""
    cache = world.cache()
    split = cache.split("train")
    cpu = torch.device("cpu")
    inputs = FrozenInputs(cache, cpu, dtype=fast_dtype(cpu))
    torch.manual_seed(CONFIG.seed)
    model = Branch(CONFIG.carryon, cache.attributes.base["hidden_size"])
    sample = sample_embeddings(split, ("final",))
    model.calibrate({"final": InputStats.of(sample["final"])})
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, CONFIG.beta2))
    loader = BatchLoader(split, batch_tokens=256 // ranks, taps=("final",), seed=CONFIG.seed)
    done, total = 0, CONFIG.epochs * split.manifest.tokens
    for epoch in range(CONFIG.epochs):
        batches = list(loader.epoch(epoch))
        for start in range(0, len(batches) - ranks + 1, ranks):
            step = batches[start : start + ranks]
            done += sum(batch.tokens for batch in step)
            targets = sum(len(batch.targets_N) for batch in step)
            optimizer.zero_grad()
            for batch in step:
                y_NH = batch.at_predicted(batch.x_BTH["final"].float()) + change_at(
                    model, batch, inputs
                )
                (
                    linear_cross_entropy(y_NH, inputs.head, batch.targets_N).sum() / targets
                ).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done / total, peak=CONFIG.lr, warmup=CONFIG.warmup)
            optimizer.step()
    return model


def close(model: CarryOn, out: Path) -> bool:
    found, expected = load_carryon(out)[0].state_dict(), model.state_dict()
    return all(torch.allclose(found[n], expected[n], rtol=1e-3, atol=1e-4) for n in expected)


def test_one_process_is_the_loop_by_hand(world, tmp_path):
    train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert close(reference(world, 1), tmp_path / "c")


def test_two_processes_share_each_step(world, tmp_path):
    done = torchrun("train", world.cache_path, "--out", tmp_path / "c", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: embedcache eval") == 1
    model = reference(world, 2)
    assert close(model, tmp_path / "c")
    assert not close(reference(world, 1), tmp_path / "c")
    # Dev was scored in shares, too.
    record = load_carryon(tmp_path / "c")[1]
    found = evaluate(tmp_path / "c", world.cache_path, split="dev", device="cpu").rows[0]
    assert record.results["best_dev"] == pytest.approx(found["cross_entropy"], abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "README.md",
        "carryon.safetensors",
        "carryon_config.json",
        "loss.png",
        "metrics.jsonl",
    ]


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(world, tmp_path):
    flags = [*FLAGS, "--lr", "1e30"]  # the last one counts
    for code, _, said in forked_ranks("train", world.cache_path, "--out", tmp_path / "c", *flags):
        assert code == 1
        assert "training stopped at step" in said
    with pytest.raises(Exception, match="another processes: 2, now 1"):
        train(world.cache_path, out=tmp_path / "c", config=replace(CONFIG, lr=1e30), device="cpu")


def test_a_sweep_is_dealt_out(world, tmp_path):
    (tmp_path / "s.toml").write_text("[grid]\nseed = [0, 1, 2]")
    ranks = forked_ranks(
        *("train", world.cache_path, "--out", tmp_path / "all"),
        *("--sweep", tmp_path / "s.toml", *FLAGS),
    )
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert "".join(printed for _, printed, _ in ranks).count("3 of 3 carry-ons") == 1
    for seed in range(3):
        out = tmp_path / str(seed)
        train(world.cache_path, out=out, config=replace(CONFIG, seed=seed), device="cpu")
        assert close(load_carryon(out)[0], tmp_path / "all" / f"seed={seed}")


@pytest.fixture
def agent_port() -> Iterator[int]:
    """The port of a store that outlives a run's end, as that of ``torchrun``'s agent does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def train_each(rank: int, port: int, cache: Path, folders: list[Path], full: bool) -> None:
    """Train into each folder; where it is ``full``, the leading process's disk is: a target."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.update(ranks_environment(rank, port) | agent)
    torch.set_num_threads(1)
    member.CHECKPOINT_SECONDS = 0.0  # the leading process saves at each step
    if full and rank == 0:

        def no_space(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        member.save_checkpoint = no_space
    for folder in folders:
        train(cache, out=folder, config=CONFIG, device="cpu")
        # Whoever joins anew may find where another one was before: now and then, by chance.
        assert dist.is_initialized()


def test_two_processes_train_one_carryon_after_the_other(world, tmp_path, agent_port):
    folders = [tmp_path / name for name in ("a", "b")]
    given = world.cache_path, folders, False
    ranks = [started(train_each, rank, agent_port, *given) for rank in range(2)]
    try:
        assert [exit_code(one, timeout=40) for one in ranks] == [0, 0]
    finally:
        for one in ranks:
            one.kill()
    expected = reference(world, 2)
    assert all(close(expected, folder) for folder in folders)


def test_what_fails_in_the_leading_process_alone_ends_it(world, tmp_path, agent_port):
    """The other one waits for its gradients, until ``torchrun`` ends it."""
    given = world.cache_path, [tmp_path / "c"], True
    leader, other = (started(train_each, rank, agent_port, *given) for rank in range(2))
    try:
        assert exit_code(leader, timeout=60) == 1
    finally:
        other.kill()
    assert not (tmp_path / "c" / "carryon.safetensors").exists()
