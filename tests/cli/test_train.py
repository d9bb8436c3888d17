"""``embedcache train``, ``eval``, ``generate`` and ``info``, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import World, random_carryon
from typer.testing import CliRunner

from embedcache.carryon.saving import load_carryon
from embedcache_cli.app import app, main

CPU = ["--device", "cpu"]
SMALL = ["--width", "32", "--blocks", "1", "--batch-tokens", "512", *CPU]


def run(*args: object) -> str:
    """Run a command that succeeds; return what it printed on stdout."""
    found = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def fails(capsys, monkeypatch, *args: object) -> tuple[int, str]:
    """Run a command that fails through `main`; return its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["embedcache", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return stopped.value.code, shown.err


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("cli") / "carryon"
    return out, run("train", world.cache_path, "--out", out, "--epochs", 2, *SMALL)


def test_train_prints_its_result_and_the_next_command(trained, world):
    out, shown = trained
    results = load_carryon(out)[1].results
    assert f"{results['parameters']:,}" in shown
    assert f"base {results['base_dev']:.4f}, carry-on {results['best_dev']:.4f}" in shown
    assert f"Next: embedcache eval {out} {world.cache_path}" in shown


def test_train_json(world, tmp_path):
    shown = run("train", world.cache_path, "--out", tmp_path / "c", "--epochs", 1, *SMALL, "--json")
    assert json.loads(shown) == load_carryon(tmp_path / "c")[1].results


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_dry_run_writes_nothing(world, tmp_path, form):
    shown = run("train", world.cache_path, "--out", tmp_path / "c", *SMALL, "--dry-run", *form)
    assert ("train_tokens" if form else "train tokens") in shown
    if form:
        assert json.loads(shown)["tokens_per_step"] == 512
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "epochs = 1\nlr = 0.01\nseed = 3\n[carryon]\nwidth = 96\nblocks = 1\n"),
        ("a.yaml", "epochs: 1\nlr: 0.01\nseed: 3\ncarryon: {width: 96, blocks: 1}\n"),
    ],
)
def test_flags_win_over_the_file(world, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    flags = ["--config", tmp_path / name, "--seed", 4, "--width", 32, "--no-gate", *CPU]
    run("train", world.cache_path, "--out", tmp_path / "c", *flags)
    _, record = load_carryon(tmp_path / "c")
    assert (record.training["lr"], record.training["epochs"], record.training["seed"]) == (
        0.01,
        1,
        4,
    )
    assert (record.config.width, record.config.blocks, record.config.gate) == (32, 1, False)


def test_eval_table_and_json_agree(trained, world):
    args = ["eval", trained[0], world.cache_path, "--alpha", 1, "--alpha", 0.5, *CPU]
    found = json.loads(run(*args, "--json"))
    assert [row["alpha"] for row in found["rows"]] == [1.0, 0.5]
    shown = run(*args)
    assert f"{found['base_cross_entropy']:.4f}" in shown
    for row in found["rows"]:
        assert f"{row['cross_entropy']:.4f}" in shown
        assert f"[{row['low']:+.4f}, {row['high']:+.4f}]" in shown


def test_eval_live_and_on_text(trained, world, tmp_path):
    cached = json.loads(run("eval", trained[0], world.cache_path, *CPU, "--json"))
    live = json.loads(run("eval", trained[0], world.cache_path, "--live", *CPU, "--json"))
    assert live["live"]
    assert live["targets"] == cached["targets"]
    assert live["base_cross_entropy"] == pytest.approx(cached["base_cross_entropy"], abs=5e-3)
    # Text is cut as the training corpus was: the context of 64, not the default of 1,024.
    text = json.loads(run("eval", trained[0], "--corpus", world.corpus, *CPU, "--json"))
    splits = [
        json.loads(run("eval", trained[0], world.cache_path, "--split", split, *CPU, "--json"))
        for split in ("train", "dev", "test")
    ]
    assert text["targets"] == sum(split["targets"] for split in splits)


def test_generate_and_compare(world, tmp_path):
    folder = random_carryon(world, tmp_path / "c")
    args = ["generate", folder, "--prompt", "The quick", "--max-new-tokens", 8, "--compare", *CPU]
    found = json.loads(run(*args, "--json"))
    assert [answer["alpha"] for answer in found["answers"]] == [0.0, 1.0]
    base, carryon = (answer["text"] for answer in found["answers"])
    assert base != carryon
    shown = run(*args)
    assert shown == f"--- base ---\n{base}\n--- carry-on, alpha 1 ---\n{carryon}\n"
    alone = json.loads(run(*args[:-3], "--alpha", 0, *CPU, "--json"))
    assert alone["answers"] == [{"alpha": 0.0, "text": base}]


def test_info_on_a_carry_on(trained, world):
    out, _ = trained
    _, record = load_carryon(out)
    found = json.loads(run("info", out, "--json"))
    assert found["kind"] == "carry-on"
    assert found["carryon"] == record.config.to_dict()
    shown = run("info", out)
    assert record.base["fingerprint"] in shown
    assert f"{record.results['parameters']:,}" in shown


def test_info_on_a_carry_on_without_dev(world, tmp_path):
    assert "dev" not in run("info", random_carryon(world, tmp_path / "x")).replace("device", "")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["train", "{cache}", "--out", "{tmp}/c", "--widht", "3"], 2, "--width"),
        (["train", "{cache}", "--out", "{tmp}/c", "--width", "33"], 2, "head_width"),
        (["train", "{cache}", "--out", "{tmp}/c", "--loss", "exat"], 2, "'exact'"),
        (["train", "{cache}", "--out", "{tmp}/c", "--taps", "fnal"], 2, "fnal"),
        (["train", "{cache}", "--out", "{tmp}/c", "--taps", "final,2"], 1, "layer_2"),
        (["train", "{cache}", "--out", "{tmp}/c", "--device", "tpu"], 2, "tpu"),
        (["train", "{cache}", "--out", "{tmp}/c", "--config", "{tmp}/no.toml"], 2, "no.toml"),
        (["train", "{tmp}/none", "--out", "{tmp}/c"], 1, "no such cache"),
        (["train", "{cache}", "--out", "{out}"], 1, "finished carry-on"),
        (["eval", "{out}"], 2, "--corpus"),
        (["eval", "{out}", "{cache}", "--corpus", "{tmp}"], 2, "--corpus"),
        (["eval", "{tmp}", "{cache}"], 1, "not a finished carry-on"),
        (["eval", "{out}", "{cache}", "--split", "tset"], 1, "tset"),
        (["eval", "{out}", "{cache}", "--live", "--base", "{tmp}/none"], 1, "none"),
        (["generate", "{out}", "--prompt", ""], 2, "empty"),
        (["generate", "{out}", "--prompt", "a", "--top-p", "2"], 2, "--top-p should"),
        (["info", "{tmp}"], 2, "{tmp}"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    args, code, words, trained, world, tmp_path, capsys, monkeypatch
):
    places = {"cache": world.cache_path, "out": trained[0], "tmp": tmp_path}
    found = fails(capsys, monkeypatch, *(arg.format(**places) for arg in args))
    assert found[0] == code
    assert words.format(**places) in found[1]
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_setting_in_a_file_names_the_nearest(world, tmp_path, capsys, monkeypatch):
    args = ["train", world.cache_path, "--out", tmp_path / "c", "--config", tmp_path / "a.yaml"]
    for text, words in (
        ("epoch: 3", "Did you mean 'epochs'"),
        ("carryon: {widht: 3}", "Did you mean 'width'"),
        ("carryon: 3", "table"),
        ("a: [", "YAML"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        code, shown = fails(capsys, monkeypatch, *args)
        assert code == 2
        assert words in shown
    assert not (tmp_path / "c").exists()


def test_a_diverging_run_exits_with_1(world, tmp_path, capsys, monkeypatch):
    args = ["train", world.cache_path, "--out", tmp_path / "c", "--lr", "1e30", *SMALL]
    code, shown = fails(capsys, monkeypatch, *args)
    assert code == 1
    assert "lower --lr" in shown
