"""Errors in the words of the command line.

The library's messages name its arguments (`` `out=` ``) and functions
(`` `embedcache.verify()` ``). Here they become options and commands.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

import typer

OPTIONS: dict[str, str] = {}
"""What a user types for an argument, by the argument's name: an option, or the name of a positional
argument. `learn_options` fills it."""

OTHER_ARGUMENTS = {
    "corpus": "CORPUS",
    "cache_path": "CACHE",
    "runs": "--sweep",
    "document": "--document",
}
"""Arguments of the library whose command has a parameter of another name."""

FUNCTIONS = {
    "append": "extract --append",
    "estimate": "extract --dry-run",
    "estimate_extraction": "extract --dry-run",
    "repair": "extract --repair",
    "sweep": "train --sweep",
    "evaluate": "eval",
    "describe": "info",
    "inspect_sequence": "inspect",
}
"""Functions whose command has another name."""

COMMANDS: dict[str, Any] = {}
"""The commands by name; `learn_options` fills it."""

_FUNCTION = re.compile(r"`embedcache\.(?:\w+\.)*(\w+)\(([^`]*)\)`")
_ARGUMENT = re.compile(r"`([a-z]\w*)=([^`]*)`")


def learn_options(commands: Mapping[str, Any], invoked: str | None) -> None:
    """Fill the tables from the commands; the invoked command's own options win."""
    COMMANDS.update(commands)
    for command in commands.values():
        OPTIONS.update(_options_of(command))
    OPTIONS.update(OTHER_ARGUMENTS)
    if invoked is not None and invoked in commands:
        OPTIONS.update(_options_of(commands[invoked]))


def _options_of(command: Any) -> dict[str, str]:
    return {
        parameter.name: (
            parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        )
        for parameter in command.params
    }


def translated(message: str) -> str:
    """Return a message of the library with options and commands for arguments and functions.

    ``"give another `out=`, or run `embedcache.verify(cache, deep=True)`"`` becomes
    ``"give another --out, or run 'embedcache verify CACHE --deep'"``.
    """
    message = _FUNCTION.sub(_command, message)
    message = _ARGUMENT.sub(lambda match: option(match[1], match[2]), message)
    return message.replace("the same call", "the same command")


def option(name: str, value: str = "") -> str:
    """Return what to type for the argument ``name`` with ``value``, a Python expression or none.

    An argument without an option is a setting, which a file of settings gives.
    """
    if name not in OPTIONS:
        return f"the setting `{name} = {value}`" if value else f"the setting `{name}`"
    flag = OPTIONS[name]
    if value == "False":
        return f"--no-{flag.removeprefix('--')}"
    word = "" if value == "True" else _typed(value)
    return f"{flag} {word}".strip() if flag.startswith("--") else word or flag


def _typed(value: str) -> str:
    """Return a Python value as a shell's word; any other text as it is.

    >>> _typed("2048"), _typed("('final', 'layer_2')"), _typed("'alice/*'"), _typed("path")
    ('2048', 'final,layer_2', "'alice/*'", 'path')
    """
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if isinstance(parsed, (list, tuple)):
        parsed = ",".join(map(str, parsed))
    return shlex.quote(parsed) if isinstance(parsed, str) else str(parsed)


def _command(match: re.Match[str]) -> str:
    """Return the command for a call; a function without a command stays as it is."""
    name, arguments = match[1], match[2]
    command = FUNCTIONS.get(name, name)
    if command.split()[0] not in COMMANDS:
        return match[0].strip("`")
    words = ["embedcache", command]
    for argument in filter(None, re.split(r",\s*(?![^(\[]*[)\]])", arguments)):
        key, equals, value = argument.partition("=")
        words.append(option(key, value) if equals else OPTIONS.get(key, _typed(key)))
    return f"'{' '.join(words)}'"


def report(kind: str, message: str, exit_code: int, *, as_json: bool) -> int:
    """Print an error as one line on stderr, under ``--json`` also as an object; return the code."""
    typer.echo(f"embedcache: {message}", err=True)
    if as_json:
        print_error(kind, message, exit_code)
    return exit_code


def print_error(kind: str, message: str, exit_code: int) -> None:
    """Print an error as one JSON object on stdout, once for all of ``torchrun``'s processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    error = {"type": kind, "message": message, "exit_code": exit_code}
    typer.echo(json.dumps({"error": error}, ensure_ascii=False))
