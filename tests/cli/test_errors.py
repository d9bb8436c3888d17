"""Errors as a user of the command line reads them."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import typer.main
from support.fixtures_extract import call_main

import embedcache
from embedcache.errors import CacheError, OutputError
from embedcache_cli.app import app
from embedcache_cli.errors import FUNCTIONS, OPTIONS, learn_options, translated

COMMAND_LINE = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def options_are_known() -> None:
    learn_options(COMMAND_LINE, "extract")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`out=` exists: give another `out=`", "--out exists: give another --out"),
        ("Try `max_tokens_per_document=200`.", "Try --max-tokens-per-document 200."),
        ("`repair=True` or `gate=False`", "--repair or --no-gate"),
        ('`taps=["final", "layer_2"]`', "--taps final,layer_2"),
        ("`completion='{answer} '`", "--completion '{answer} '"),
        ("`dev_sources=` and `cache=`", "--dev and CACHE"),
        ("`samples=` is too small", "the setting `samples` is too small"),
        ("`embedcache.evaluate(carryon, cache)`", "'embedcache eval CARRYON CACHE'"),
        (
            "`embedcache.editing.repair.repair(out='c')`, then the same call",
            "'embedcache extract --repair --out c', then the same command",
        ),
        ("`embedcache.load()` and `width`", "embedcache.load() and `width`"),
        ("`widht=` is unknown", "the setting `widht` is unknown"),
    ],
)
def test_messages_of_the_library_are_translated(message: str, expected: str) -> None:
    assert translated(message) == expected


@pytest.mark.parametrize(
    "name", ["extract", "train", "sweep", "evaluate", "append", "delete", "merge", "verify"]
)
def test_every_argument_of_a_public_function_is_an_option(name: str) -> None:
    arguments = signature(getattr(embedcache, name)).parameters.values()
    names = {each.name for each in arguments if each.kind is not each.VAR_KEYWORD}
    # A configuration has an option for each setting, or a file for all of them.
    assert names - set(OPTIONS) <= {"settings", "progress"}


def test_every_command_of_the_table_exists() -> None:
    assert {command.split()[0] for command in FUNCTIONS.values()} <= set(COMMAND_LINE)


def test_a_name_that_several_commands_have_is_the_invoked_ones() -> None:
    assert translated("`corpus=` is empty") == "CORPUS is empty"
    learn_options(COMMAND_LINE, "eval")
    assert translated("`corpus=` is empty") == "--corpus is empty"
    assert translated("`cache=`, `alphas=0.5`") == "CACHE, --alpha 0.5"
    learn_options(COMMAND_LINE, "train")
    assert translated("`documents=['a/*']`") == "--document 'a/*'"


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (OutputError("give another `out=`"), 1, "OutputError", "give another --out"),
        (CacheError("run `embedcache.verify()`"), 1, "CacheError", "run 'embedcache verify'"),
        (OSError(28, "No space left on device"), 1, "OSError", "No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted", "run the same command again"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_error_is_one_line_and_under_json_an_object(
    error: BaseException,
    code: int,
    kind: str,
    message: str,
    form: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("embedcache.info.describe", fail)
    assert call_main(monkeypatch, "info", "cache", *form) == code
    printed, said = capsys.readouterr()
    assert said.startswith("embedcache: ")
    assert message in said
    assert said.count("\n") == 1
    if not form:
        assert printed == ""
        return
    found = json.loads(printed)["error"]
    assert (found["type"], found["exit_code"]) == (kind, code)
    assert found["message"] == said.removeprefix("embedcache: ").rstrip("\n")


def test_a_wrong_option_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "info", "cache", "--jsn", "--json") == 2
    printed, said = capsys.readouterr()
    assert "--jsn" in said
    assert "Try 'embedcache info -h' for help" in said
    found = json.loads(printed)["error"]
    assert (found["type"], found["exit_code"]) == ("UsageError", 2)
    assert "--jsn" in found["message"]


def test_only_the_first_of_torchruns_processes_prints_the_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call_main(monkeypatch, "info", "nowhere", "--json") == 2
    assert capsys.readouterr().out == ""
