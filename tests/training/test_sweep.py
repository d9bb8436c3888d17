"""Many carry-ons at once: each as the loop over them makes it."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import World
from safetensors.torch import load_file
from support.forked import die, run_forked
from typer.testing import CliRunner

from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.saving import load_carryon
from embedcache.errors import NumericsError, OutputError, UsageError
from embedcache.evaluation.evaluate import evaluate
from embedcache.training.config import TrainConfig
from embedcache.training.run import run as member
from embedcache.training.run.checkpoint import CHECKPOINT
from embedcache.training.step.stack import Stack
from embedcache.training.train import sweep, train
from embedcache_cli.app import app

SMALL = BranchConfig(width=32, blocks=1)
CONFIG = TrainConfig(carryon=SMALL, epochs=2, batch_tokens=256, lr=5e-3, loss="exact")
MANY = {
    "one": CONFIG,
    "rate": replace(CONFIG, lr=1e-2),
    "order": replace(CONFIG, order_seed=5),
    "seed": replace(CONFIG, seed=3, weight_decay=0.3),
    "born": replace(CONFIG, seed=9, order_seed=0),
    "step": replace(CONFIG, batch_tokens=128, epochs=1),
    "some": replace(CONFIG, documents=("*[02468].txt",)),
    "ids": replace(CONFIG, carryon=replace(SMALL, token_input=True, gate=False)),
}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_carryon(out)[0].state_dict()


def close(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in a)


def placed(folder: Path, configs: dict[str, TrainConfig]) -> dict[Path, TrainConfig]:
    return {folder / name: config for name, config in configs.items()}


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_a_sweep_is_the_loop_over_its_runs(world: World, tmp_path, loss, monkeypatch):
    runs = {name: replace(config, loss=loss) for name, config in MANY.items()}
    sizes = []
    take = Stack.differentiate
    monkeypatch.setattr(
        Stack,
        "differentiate",
        lambda self, work: (sizes.append(len(work)), take(self, work))[1],
    )
    found = sweep(world.cache_path, runs=placed(tmp_path / "all", runs), device="cpu")
    assert max(sizes) == 7  # all but the one of another shape
    for (name, config), result in zip(runs.items(), found, strict=True):
        alone = train(world.cache_path, out=tmp_path / name, config=config, device="cpu")
        assert result.failure is None
        assert (result.summary.steps, result.summary.tokens) == (alone.steps, alone.tokens)
        assert result.summary.best_dev == pytest.approx(alone.best_dev, rel=1e-4)
        assert result.summary.base_dev == pytest.approx(alone.base_dev, rel=1e-6)
        assert close(tmp_path / "all" / name, tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == sorted(
            p.name for p in (tmp_path / "all" / name).iterdir()
        )
    assert not close(tmp_path / "one", tmp_path / "order")
    assert not close(tmp_path / "one", tmp_path / "some")
    assert not close(tmp_path / "one", tmp_path / "born")


def test_one_that_fails_leaves_the_others_untouched(world, tmp_path, monkeypatch):
    monkeypatch.setattr(member, "CHECKPOINT_SECONDS", 0.0)
    good = {name: MANY[name] for name in ("one", "rate", "some")}
    runs = {"bad": replace(CONFIG, lr=1e30), **good}
    found = sweep(world.cache_path, runs=placed(tmp_path / "with", runs), device="cpu")
    without = sweep(world.cache_path, runs=placed(tmp_path / "without", good), device="cpu")
    assert isinstance(found[0].failure, NumericsError)
    kept = load_file(tmp_path / "with" / "bad" / CHECKPOINT)
    assert all(value.isfinite().all() for value in kept.values())
    assert [result.failure for result in (*found[1:], *without)] == [None] * 6
    for name in good:
        assert close(tmp_path / "with" / name, tmp_path / "without" / name)


def test_one_whose_folder_is_lost_leaves_the_others_untouched(world, tmp_path, monkeypatch):
    finish = Stack.finish

    def losing(self, loss_K):
        found = finish(self, loss_K)
        path = tmp_path / "all" / "rate" / "metrics.jsonl"
        if path.is_file():
            path.unlink()
            path.mkdir()
        return found

    monkeypatch.setattr(Stack, "finish", losing)
    runs = {name: MANY[name] for name in ("one", "rate")}
    one, rate = sweep(world.cache_path, runs=placed(tmp_path / "all", runs), device="cpu")
    assert one.failure is None
    assert isinstance(rate.failure, IsADirectoryError)


def test_early_stopping_is_each_one_s_own(world, tmp_path):
    runs = {
        "stops": replace(CONFIG, epochs=6, lr=1e-30, patience=1),  # no epoch is better than another
        "goes on": replace(CONFIG, epochs=6, patience=6),
    }
    stops, goes_on = sweep(world.cache_path, runs=placed(tmp_path, runs), device="cpu")
    assert stops.summary.epochs == 2
    assert goes_on.summary.epochs == 6


def test_documents_are_trained_and_scored_on_alone(world, tmp_path):
    cache = world.cache()
    chosen = {
        split: [n for n in cache.split(split).documents if n.endswith(("0.txt", "1.txt", "2.txt"))]
        for split in ("train", "dev")
    }
    assert all(chosen.values())
    config = replace(CONFIG, documents=("*[012].txt",), epochs=1)
    result = train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    tokens = 0
    split = cache.split("train")
    for block in range(split.manifest.blocks):
        _, rows, documents = split.sequences(block)
        for (a, b), document in zip(rows, documents, strict=True):
            tokens += int(b - a) * (split.documents[document] in chosen["train"])
    assert 0 < tokens < split.manifest.tokens
    assert result.tokens == tokens
    whole = train(world.cache_path, out=tmp_path / "d", config=CONFIG, device="cpu")
    assert result.base_dev != pytest.approx(whole.base_dev, abs=1e-4)


def test_documents_that_are_not_there(world, tmp_path):
    config = replace(CONFIG, documents=("alcie/*",))
    with pytest.raises(UsageError, match=r"no document of the train split matches alcie/\*"):
        train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert not (tmp_path / "c").exists()


def test_a_bad_run_is_refused_before_any_is_begun(world, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        sweep(world.cache_path, runs={tmp_path / n: CONFIG for n in "abc"}, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def sweep_until_saved(cache: Path, folder: Path, number: int) -> None:
    """Train `MANY`, and die when the first one was saved so often: a process's target."""
    member.CHECKPOINT_SECONDS = 0.0
    save, saves = member.save_checkpoint, []

    def saving(path: Path, *given, **more):
        save(path, *given, **more)
        saves.extend([path] * (path.parent.name == "one"))  # the rest are a step behind
        if len(saves) == number:
            die()

    member.save_checkpoint = saving
    sweep(cache, runs=placed(folder, MANY), device="cpu")


@pytest.mark.parametrize("saves", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_a_killed_sweep_goes_on_to_the_same(world, tmp_path, saves):
    runs = placed(tmp_path / "killed", MANY)
    code = run_forked(sweep_until_saved, world.cache_path, tmp_path / "killed", saves)
    assert code == -signal.SIGKILL
    found = sweep(world.cache_path, runs=runs, device="cpu")
    again = sweep(world.cache_path, runs=runs, device="cpu")  # all are finished: nothing to do
    assert [result.summary for result in again] == [result.summary for result in found]
    assert max(result.summary.resumed_at_step for result in found) > 0
    for name, config in MANY.items():
        train(world.cache_path, out=tmp_path / name, config=config, device="cpu")
        assert close(tmp_path / "killed" / name, tmp_path / name)


# --- the command


def command(world: World, tmp_path: Path, text: str, *flags: str):
    (tmp_path / "s.toml").write_text(text)
    arguments = ["train", world.cache_path, "--out", tmp_path / "all", "--sweep"]
    arguments += [tmp_path / "s.toml", "--device", "cpu", *flags]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SHARED = "epochs = 1\nbatch_tokens = 256\ncarryon = { width = 32, blocks = 1 }\n"


def test_the_command_ranks_what_it_trained(world, tmp_path):
    found = command(world, tmp_path, SHARED + "[grid]\nlr = [1e-4, 1e-2]")
    assert found.exit_code == 0, found.output
    assert found.stdout.index("lr=0.01") < found.stdout.index("lr=0.0001")
    board = json.loads((tmp_path / "all" / "leaderboard.json").read_text())
    assert [row["name"] for row in board] == ["lr=0.01", "lr=0.0001"]
    for row in board:
        shown = evaluate(tmp_path / "all" / row["name"], world.cache_path, split="dev")
        assert row["dev_gain"] == pytest.approx(-shown.rows[0]["difference"], abs=1e-5)
    assert (tmp_path / "all" / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_fails_where_a_run_does(world, tmp_path):
    found = command(world, tmp_path, SHARED + "[grid]\nlr = [1e30, 1e-2]", "--json")
    assert found.exit_code == 1
    rows = json.loads(found.stdout)
    assert [row["failure"] is None for row in rows] == [True, False]
    assert "lr=1e+30 failed: training stopped" in found.stderr


def test_a_dry_run_of_a_sweep_writes_nothing(world, tmp_path):
    found = command(world, tmp_path, SHARED + "[grid]\nseed = [0, 1]", "--dry-run")
    assert found.exit_code == 0
    assert "seed=1" in found.stdout
    assert not (tmp_path / "all").exists()
