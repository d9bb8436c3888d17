"""Errors as a user of the command line reads them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from support.fixtures_extract import call_main

import embedcache
from embedcache.errors import CacheError, OutputError
from embedcache_cli.app import app
from embedcache_cli.errors import ARGUMENTS, COMMANDS, FILE_SETTINGS, FUNCTIONS, option, translated

LIBRARY = Path(embedcache.__file__).parent
COMMAND_LINE = typer.main.get_command(app).commands  # type: ignore[attr-defined]


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
    ],
)
def test_messages_of_the_library_are_translated(message: str, expected: str) -> None:
    assert translated(message) == expected


def messages() -> Iterator[tuple[str, str]]:
    """Yield the strings of the library that are not docstrings, with their files."""
    for path in LIBRARY.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                yield str(path), str(node.value)


def test_every_argument_that_a_message_names_can_be_typed() -> None:
    flags = {
        flag for command in COMMAND_LINE.values() for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }  # fmt: skip
    metavars = {value for value in ARGUMENTS.values() if not value.startswith("--")}
    for path, message in messages():
        for name in re.findall(r"`([a-z]\w*)=", message):
            assert name in FILE_SETTINGS or option(name) in flags | metavars, (path, name)


def test_every_command_of_the_table_exists() -> None:
    assert set(COMMANDS) == set(COMMAND_LINE)
    assert {command.split()[0] for command in FUNCTIONS.values()} <= set(COMMANDS)


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
