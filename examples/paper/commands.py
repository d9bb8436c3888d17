"""What the scripts of this folder share: the product's commands, run in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from embedcache_cli.app import app


def embedcache(*arguments: str) -> dict[str, Any]:
    """Run one command with ``--json`` and return what it printed.

    In this process: a process each would load torch and start CUDA twenty times.
    """
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(f"embedcache {' '.join(arguments)}: {done.stderr}")
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def extract(source: str, cache: Path, *, base: str, flags: list[str]) -> dict[str, Any]:
    """Extract one corpus; a cache that is complete already is left as it is."""
    summary = embedcache("extract", source, "--base", base, "--out", str(cache), *flags)
    summary.pop("corpus")
    print(json.dumps(summary), flush=True)
    return summary


def gsm8k_files(train: Path, test: Path, out: Path) -> tuple[str, list[str]]:
    """Write the first 7,000 training problems to train on, the rest for dev.

    Returns the corpus and the flags of ``embedcache extract``: one problem a sequence, the loss on
    its answer only.
    """
    with train.open(encoding="utf-8") as file:
        (out / "train.jsonl").write_text("".join(itertools.islice(file, 7000)), "utf-8")
        (out / "dev.jsonl").write_text("".join(file), "utf-8")
    flags = ["--dev", str(out / "dev.jsonl"), "--test", str(test)]
    flags += ["--prompt", "Question: {question}\\nAnswer: ", "--completion", "{answer}"]
    return str(out / "train.jsonl"), flags
