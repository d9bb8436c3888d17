"""Errors as a user of the command line reads them.

The library's messages name its arguments (`` `out=` ``) and functions
(`` `embedcache.verify()` ``). Here they become options and commands.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex

import typer

ARGUMENTS = {
    "cache": "CACHE",
    "caches": "CACHE...",
    "cache_path": "CACHE",
    "carryon": "CARRYON",
    "carryon_path": "CARRYON",
    "path": "PATH",
    "corpus": "CORPUS",
    "sources": "CORPUS",
    "dev_sources": "--dev",
    "test_sources": "--test",
    "document": "--document",
    "documents": "--document",
    "alphas": "--alpha",
    "runs": "--sweep",
}
"""Arguments whose option is not ``--name``: positional ones, and those with another name."""

FILE_SETTINGS = (
    *("warmup", "weight_decay", "beta2", "clip", "samples", "order_seed"),
    *("head_width", "mlp_ratio"),
)
"""Settings of a training run without an option: a file gives them."""

FUNCTIONS = {
    "append": "extract --append",
    "estimate": "extract --dry-run",
    "repair": "extract --repair",
    "sweep": "train --sweep",
    "evaluate": "eval",
    "describe": "info",
    "inspect_sequence": "inspect",
}
"""Functions whose command has another name."""

COMMANDS = (
    *("extract", "train", "eval", "generate"),
    *("info", "inspect", "verify", "delete", "merge"),
)

_FUNCTION = re.compile(r"`embedcache\.(?:\w+\.)*(\w+)\(([^`]*)\)`")
_ARGUMENT = re.compile(r"`([a-z]\w*)=([^`]*)`")


def translated(message: str) -> str:
    """Return a message of the library with options and commands for arguments and functions.

    >>> translated("give another `out=`, or `codec='int8'`")
    'give another --out, or --codec int8'
    >>> translated("Run `embedcache.verify(cache, deep=True)`.")
    "Run 'embedcache verify CACHE --deep'."
    >>> translated("`sources=` is empty; run the same call again")
    'CORPUS is empty; run the same command again'
    """
    message = _FUNCTION.sub(_command, message)
    message = _ARGUMENT.sub(lambda match: option(match[1], match[2]), message)
    return message.replace("the same call", "the same command")


def option(name: str, value: str = "") -> str:
    """Return what to type for the argument ``name`` with ``value``, a Python expression or none.

    >>> option("batch_tokens", "2048"), option("gate", "False"), option("taps", "('final', '15')")
    ('--batch-tokens 2048', '--no-gate', '--taps final,15')
    >>> option("documents", "['alice/*']"), option("cache", "'both'"), option("clip", "1.0")
    ("--document 'alice/*'", 'both', '`clip = 1.0` in the --config file')
    """
    if name in FILE_SETTINGS:
        return f"`{name} = {value}` in the --config file" if value else f"the setting `{name}`"
    flag = ARGUMENTS.get(name, f"--{name.replace('_', '-')}")
    if value == "False":
        return f"--no-{flag.removeprefix('--')}"
    typed = "" if value == "True" else _typed(value)
    return (typed or flag) if not flag.startswith("--") else f"{flag} {typed}".strip()


def _typed(value: str) -> str:
    """Return a Python value as a shell's word; any other text as it is."""
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
        words.append(option(key, value) if equals else ARGUMENTS.get(key, _typed(key)))
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
