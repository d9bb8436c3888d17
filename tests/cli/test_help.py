"""Help pages: what they say, and that nothing heavy is imported for them."""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from embedcache.cache.format.layout import ExtractSettings
from embedcache.carryon.branch.config import BranchConfig
from embedcache.compose.generate import Sampling
from embedcache.corpus.config import CorpusConfig
from embedcache.training.config import TrainConfig
from embedcache_cli.app import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WRITERS = ("extract", "train", "delete", "merge")
PROBE = f"""
import sys
from embedcache_cli.app import main
for command in ([], *([name] for name in {list(COMMANDS)!r})):
    sys.argv = ["embedcache", *command, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0, command
heavy = ("torch", "transformers", "zarr", "numpy", "rich")
print("heavy:", [name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def shown(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 0
    return found.stdout


def test_no_help_page_imports_anything_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("Usage: embedcache") == 1 + len(COMMANDS)
    assert done.stderr == "heavy: []\n"


@pytest.mark.parametrize("command", [[], ["extract"]], ids=["(none)", "extract"])
def test_help_takes_less_than_three_tenths_of_a_second(command: list[str]) -> None:
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(
            [sys.executable, "-m", "embedcache_cli", *command, "--help"],
            check=True,
            capture_output=True,
        )
        taken.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(taken) < 0.3, taken


def test_version() -> None:
    assert shown("--version").startswith("embedcache 0.")


def test_the_root_page_documents_exit_codes_variables_and_completion() -> None:
    page = shown("-h")
    for word in ("Exit codes:", "130", "EMBEDCACHE_HOME", "XDG_CACHE_HOME", "PYTORCH_ALLOC_CONF"):
        assert word in page
    assert "--install-completion" in page
    assert "--show-completion" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options_and_examples_that_parse(name: str) -> None:
    page = shown(name, "-h")
    assert page == shown(name, "--help")
    assert "--json" in page
    assert ("--dry-run" in page) is (name in WRITERS)
    *_, examples = page.partition("\nExamples:\n")
    assert examples
    for line in examples.splitlines():
        words = shlex.split(line)
        assert name in words
        arguments = words[words.index(name) + 1 :]
        COMMANDS[name].make_context(name, arguments)  # raises for an unknown option


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("extract", CorpusConfig(sources=("corpus",))),
        ("extract", ExtractSettings()),
        ("train", TrainConfig()),
        ("train", BranchConfig()),
        ("generate", Sampling()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_defaults_are_those_of_the_library(name: str, configuration: Any) -> None:
    options = {parameter.name: parameter for parameter in COMMANDS[name].params}
    compared = 0
    for field in fields(configuration):
        default = getattr(configuration, field.name)
        if field.name in options and (given := options[field.name].default) is not None:
            assert given == (",".join(default) if field.name == "taps" else default), field.name
            compared += 1
    assert compared


def test_extract_groups_its_options() -> None:
    groups = re.findall(r"^(\S.*):$", shown("extract", "-h"), re.MULTILINE)
    assert groups == [
        *("Arguments", "Options", "Base", "What is stored", "Splits", "Records and encodings"),
        *("Lengths and limits", "Existing caches", "Examples"),
    ]
