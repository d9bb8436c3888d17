"""Bars and remarks go to stderr, in the words of the command line."""

from __future__ import annotations

import sys

import pytest
import typer.main

from embedcache_cli.app import app
from embedcache_cli.errors import learn_options
from embedcache_cli.show import TerminalProgress, print_table


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_shown_on_stderr_if_it_is_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with TerminalProgress().bar("computing", 10, "tokens") as bar:
        bar.advance(10, "loss 1.5")
    printed, said = capsys.readouterr()
    assert printed == ""
    assert ("computing" in said) is terminal
    assert ("loss 1.5" in said) is terminal


def test_a_remark_is_a_line_on_stderr_with_options_for_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn_options(typer.main.get_command(app).commands, "train")  # type: ignore[attr-defined]
    TerminalProgress().say("raise `memory=` to 1GB")
    assert capsys.readouterr() == ("", "raise --memory to 1GB\n")


def test_a_table_aligns_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["run", "dev"], [["a", 1.25], ["longer", 12]])
    assert capsys.readouterr().out.splitlines() == [
        "run      dev",
        "------  ----",
        "a       1.25",
        "longer    12",
    ]
