"""Stage two on a real tiny cache."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import World, make_world
from safetensors.torch import load_file

from embedcache.cache.split_reader import SplitReader
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.saving import CONFIG_FILE, load_carryon
from embedcache.errors import CacheError, NumericsError, OutputError, UsageError
from embedcache.training.config import TrainConfig, config_from, read_settings
from embedcache.training.run import run as run_module
from embedcache.training.run.checkpoint import CHECKPOINT, METRICS_FILE
from embedcache.training.scoring import DevLoss
from embedcache.training.step.stack import Stack
from embedcache.training.train import preview, train
from embedcache.training.trainer import Trainer

SMALL = BranchConfig(width=32, blocks=1)
CONFIG = TrainConfig(carryon=SMALL, epochs=2, batch_tokens=256, lr=5e-3, loss="exact")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_carryon(out)[0].state_dict()


def equal(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "carryon"
    return out, train(world.cache_path, out=out, config=CONFIG, device="cpu")


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_the_seed_alone_decides_the_weights(world, tmp_path, loss):
    config = replace(CONFIG, loss=loss, epochs=1, samples=64)
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        train(
            world.cache_path,
            out=tmp_path / str(number),
            config=replace(config, seed=seed),
            device="cpu",
        )
    assert equal(tmp_path / "0", tmp_path / "1")
    assert not equal(tmp_path / "0", tmp_path / "2")


def test_it_learns(world, tmp_path):
    config = replace(CONFIG, epochs=6, lr=1e-2)
    result = train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert result.best_dev < result.base_dev - 0.2


def test_the_shortlist_learns_what_the_exact_loss_does(world, tmp_path):
    found = {
        loss: train(
            world.cache_path,
            out=tmp_path / loss,
            config=replace(CONFIG, loss=loss, samples=200),
            device="cpu",
        )
        for loss in ("exact", "shortlist")
    }
    gain = found["exact"].base_dev - found["exact"].best_dev
    assert found["exact"].shortlist_bias is None
    assert -0.1 < found["shortlist"].shortlist_bias < 0
    assert abs(found["exact"].best_dev - found["shortlist"].best_dev) < 0.1 * gain


def test_the_summary_counts(finished, world):
    _, result = finished
    tokens = world.cache().split("train").manifest.tokens
    assert (result.epochs, result.tokens, result.resumed_at_step) == (2, 2 * tokens, 0)
    assert result.steps >= 2 * tokens / 256
    assert result.parameters == load_carryon(Path(result.out))[0].parameter_count()
    assert result.seconds > 0
    assert math.isclose(result.tokens_per_second, result.tokens / result.seconds, rel_tol=0.01)


def test_a_finished_folder_is_whole_and_nothing_else(finished):
    out, result = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "carryon.safetensors",
        CONFIG_FILE,
        "loss.png",
        METRICS_FILE,
    ]
    png = (out / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-8:-4] == b"IEND"
    card = (out / "README.md").read_text()
    assert f"{result.parameters:,} parameters" in card
    assert f"base {result.base_dev:.4f}, carry-on {result.best_dev:.4f}" in card
    assert f"kept epoch {result.best_epoch}" in card
    _, record = load_carryon(out)
    assert record.base["fingerprint"] in card
    assert record.training == CONFIG.to_dict()
    assert record.results["best_dev"] == result.best_dev


def test_metrics_are_json_lines_with_finite_numbers(finished):
    out, result = finished
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    assert rows[0] == {"step": 0, "epoch": 0, "dev_loss": result.base_dev}
    epochs = [row for row in rows if "train_loss" in row]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert min(row["dev_loss"] for row in epochs) == result.best_dev
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(10, result.steps + 1, 10))
    assert all(math.isfinite(v) for row in rows for v in row.values())


def test_the_epoch_s_speed_is_of_the_whole_epoch(world, tmp_path, monkeypatch):
    """Also where checkpoints fall within it."""
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "c" / METRICS_FILE).read_text().splitlines()]
    result = json.loads((tmp_path / "c" / CONFIG_FILE).read_text())["results"]
    speeds = [row["tokens_per_second"] for row in rows if "train_loss" in row]
    assert min(speeds) <= result["tokens_per_second"] * 1.05
    assert max(speeds) <= result["tokens_per_second"] * 3


def test_early_stopping_keeps_the_best_epoch(world, tmp_path, monkeypatch):
    scores = iter([5.0, 4.0, 3.0, 3.5, 3.6, 1.0])
    kept: dict[int, torch.Tensor | None] = {}

    def scored(self: Trainer, run, stack, *_) -> list[DevLoss]:
        kept[len(kept)] = None if stack is None else stack.branch.weight.detach()[0].clone()
        return [DevLoss(next(scores))]

    monkeypatch.setattr(Trainer, "score", scored)
    config = replace(CONFIG, epochs=9, patience=2)
    result = train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert (result.epochs, result.best_epoch, result.best_dev) == (4, 2, 3.0)
    assert torch.equal(weights(tmp_path / "c")["branch.weight"], kept[2])
    assert not torch.equal(kept[2], kept[4])


def test_without_dev_the_last_epoch_is_kept(tmp_path):
    world = make_world(tmp_path, dev=0.0)
    result = train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert (result.best_epoch, result.base_dev, result.best_dev) == (2, None, None)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "None" not in card
    assert "dev cross-entropy" not in card


def test_taps_and_token_input_are_trained(tapped, tmp_path):
    shape = replace(SMALL, taps=("final", "layer_1"), token_input=True, bridge_bits=8, gate=False)
    config = replace(CONFIG, carryon=shape, epochs=3)
    result = train(tapped.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert result.best_dev < result.base_dev


# --- numbers that are not


def test_a_diverging_run_stops_and_keeps_finite_weights(world, tmp_path):
    config = replace(CONFIG, lr=1e30)
    with pytest.raises(NumericsError, match="lower `lr=`"):
        train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert not (tmp_path / "c" / CONFIG_FILE).exists()
    kept = load_file(tmp_path / "c" / CHECKPOINT)
    assert all(value.isfinite().all() for value in kept.values())


def test_a_dev_score_that_is_no_number_stops_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Trainer, "score", lambda *given: [DevLoss(math.nan if given[2] else 5.0, None)]
    )
    with pytest.raises(NumericsError, match="dev"):
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert not (tmp_path / "c" / CONFIG_FILE).exists()


def test_a_poisoned_cache_stops_the_run_before_the_harm(world, tmp_path, monkeypatch):
    read = SplitReader.stored

    def poisoned(self, number, *more):
        block = read(self, number, *more)
        if self.name == "train" and number == self.manifest.blocks - 1:
            block.arrays["final"]["embeddings"][3] = 0x7FC0  # NaN in bfloat16
        return block

    monkeypatch.setattr(SplitReader, "stored", poisoned)
    with pytest.raises(NumericsError):
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    kept = load_file(tmp_path / "c" / CHECKPOINT)
    assert all(value.isfinite().all() for value in kept.values())
    # Mended, the same run goes on from there and ends as if nothing had been.
    monkeypatch.undo()
    train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    train(world.cache_path, out=tmp_path / "d", config=CONFIG, device="cpu")
    assert equal(tmp_path / "c", tmp_path / "d")


def test_one_that_fails_at_the_last_step_of_an_epoch_is_kept_before_it(
    world, tmp_path, monkeypatch
):
    """What a step came to is read after the next batch was asked for: there is none here."""
    planned = preview(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    finish, last, steps = Stack.finish, planned.steps - 1, []

    def failing(self, loss_K):
        steps.append(1)
        return finish(self, loss_K * (math.nan if len(steps) > last else 1))

    monkeypatch.setattr(Stack, "finish", failing)
    with pytest.raises(NumericsError, match=f"step {last}"):
        train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    monkeypatch.undo()
    result = train(world.cache_path, out=tmp_path / "c", config=CONFIG, device="cpu")
    assert (result.resumed_at_step, result.steps) == (last, planned.steps)
    other = train(world.cache_path, out=tmp_path / "d", config=CONFIG, device="cpu")
    assert result.best_dev == other.best_dev
    assert equal(tmp_path / "c", tmp_path / "d")


@pytest.mark.parametrize("asked", ["auto", "exact"])
def test_a_shortlist_is_for_vocabularies_much_longer_than_it(world, tmp_path, asked):
    most = world.cache().attributes.base["vocab_size"] // 8
    for samples, found in ((most, "shortlist"), (most + 1, "exact")):
        config = replace(CONFIG, loss=asked, samples=samples)
        planned = preview(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
        assert planned.loss == (found if asked == "auto" else asked)


# --- the output folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(world: World, out: Path, words: str, config: TrainConfig = CONFIG) -> None:
    before = snapshot(out) if out.is_dir() else out.read_bytes()
    for verb in (train, preview):
        with pytest.raises(OutputError, match=words):
            verb(world.cache_path, out=out, config=config, device="cpu")
    assert (snapshot(out) if out.is_dir() else out.read_bytes()) == before


def test_a_finished_carry_on_is_never_overwritten(world, finished):
    refuse(world, finished[0], "finished carry-on")


def test_something_else_is_left_alone(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refuse(world, tmp_path, "thesis.txt")
    refuse(world, tmp_path / "thesis.txt", "is a file")


def test_another_run_s_checkpoint_is_left_alone(world, tapped, tmp_path):
    with pytest.raises(NumericsError):
        train(world.cache_path, out=tmp_path, config=replace(CONFIG, lr=1e30), device="cpu")
    refuse(world, tmp_path, "another config: lr was 1e\\+30, now 0.005")
    refuse(tapped, tmp_path, "another cache", replace(CONFIG, lr=1e30))


def test_a_damaged_checkpoint_is_named(world, tmp_path):
    with pytest.raises(NumericsError):
        train(world.cache_path, out=tmp_path, config=replace(CONFIG, lr=1e30), device="cpu")
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match=CHECKPOINT) as caught:
        train(world.cache_path, out=tmp_path, config=replace(CONFIG, lr=1e30), device="cpu")
    assert type(caught.value).__name__ == "CarryOnError"


def test_a_cache_that_lacks_a_tap(world, tmp_path):
    config = replace(CONFIG, carryon=replace(SMALL, taps=("final", "layer_2")))
    with pytest.raises(CacheError, match=r"`taps=\('final', 'layer_2'\)`"):
        train(world.cache_path, out=tmp_path / "c", config=config, device="cpu")
    assert not (tmp_path / "c").exists()


def test_the_preview_is_what_happens(world, finished, tmp_path):
    plan = preview(world.cache_path, out=tmp_path / "new", config=CONFIG, device="cpu")
    assert not (tmp_path / "new").exists()
    assert plan.parameters == finished[1].parameters
    assert plan.train_tokens * 2 == finished[1].tokens
    assert abs(plan.steps - finished[1].steps) <= 0.35 * finished[1].steps


# --- settings as keywords


def test_settings_are_keywords_as_well_as_a_configuration(world, finished, tmp_path):
    """Names of the run's configuration and of the carry-on's; paths may be text."""
    out = tmp_path / "c"
    keywords = {"epochs": 2, "batch_tokens": 256, "lr": 5e-3, "loss": "exact"}
    shape = {"width": 32, "blocks": 1}
    found = train(str(world.cache_path), out=str(out), device="cpu", **keywords, **shape)
    assert equal(out, finished[0])
    assert repr(found).startswith(f"TrainSummary(out={str(out)!r}, epochs=2, steps=")
    assert len(repr(found)) < len(str(out)) + 100
    assert config_from(None, keywords | shape) == CONFIG
    assert config_from(None, keywords | {"carryon": SMALL}) == CONFIG
    assert config_from(None, keywords | shape | {"kind": "branch"}) == CONFIG


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widht": 32}, "Did you mean 'width'"),
        ({"epoch": 3}, "Did you mean 'epochs'"),
        ({"kind": "brunch"}, "Did you mean 'branch'"),
        ({"width": 0}, "`width=`"),
        ({"config": CONFIG, "lr": 1e-3}, "exclude each other, found both: `lr=`"),
        ({"carryon": SMALL, "width": 64}, "found `width=` as well"),
    ],
)
def test_keywords_that_cannot_be_settings(world, tmp_path, settings, words):
    for verb in (train, preview):
        with pytest.raises(UsageError, match=words):
            verb(world.cache_path, out=tmp_path / "c", device="cpu", **settings)
    assert not (tmp_path / "c").exists()


# --- configuration files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "epochs = 3\nlr = 0.01\n[carryon]\nwidth = 96\ntaps = ['final', 'layer_1']\n"),
        ("a.yaml", "epochs: 3\nlr: 0.01\ncarryon:\n  width: 96\n  taps: [final, layer_1]\n"),
    ],
)
def test_settings_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = TrainConfig.from_dict(read_settings(tmp_path / name))
    shape = BranchConfig(width=96, taps=("final", "layer_1"))
    assert found == TrainConfig(epochs=3, lr=0.01, carryon=shape)
    assert TrainConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "epochs = ", "not valid TOML"),
        ("a.toml", "epochs = 3\nepochs = 4", "not valid TOML"),
        ("a.yaml", "epochs: [", "not valid YAML"),
        ("a.yaml", "- 3", "found a list"),
        ("a.json", "{}", "must end in"),
        ("a.toml", "epoch = 3", "Did you mean 'epochs'"),
        ("a.yaml", "carryon: {widht: 3}", "Did you mean 'width'"),
        ("a.yaml", "carryon: 3", "table"),
        ("a.toml", "epochs = '3'", "epochs"),
        ("a.toml", "epochs = 1.5", "epochs"),
        ("a.toml", "epochs = true", "epochs"),
        ("a.toml", "lr = -1", "lr"),
        ("a.toml", "lr = inf", "lr"),
        ("a.toml", "lr = nan", "lr"),
        ("a.toml", "seed = -1", "seed"),
        ("a.toml", "warmup = 1.0", "warmup"),
        ("a.toml", "beta2 = 1.0", "beta2"),
        ("a.toml", "weight_decay = -0.1", "weight_decay"),
        ("a.toml", "loss = 'exat'", "Did you mean 'exact'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_dict(read_settings(tmp_path / name))


def test_settings_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="no such"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid"):
        read_settings(tmp_path / "a.toml")


# --- the base is never opened


def test_the_base_may_be_gone_and_transformers_is_not_imported(tmp_path):
    world = make_world(tmp_path)
    shutil.rmtree(world.base_path)
    shutil.rmtree(world.corpus)
    script = """
import json, sys
from embedcache_cli.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["embedcache", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
    print()
found = [m for m in sys.modules if m.split(".")[0] in ("transformers", "tokenizers", "gguf")]
assert not found, found[:5]
"""
    flags = ["--width", "32", "--epochs", "1", "--device", "cpu", "--json"]
    commands = [
        ["train", str(world.cache_path), "--out", str(tmp_path / "c"), *flags],
        ["eval", str(tmp_path / "c"), str(world.cache_path), "--device", "cpu", "--json"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [*map(json.loads, done.stdout.strip().split("\n\n"))]
