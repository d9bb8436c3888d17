"""The commands of ``embedcache`` as functions, for the scripts of this folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from embedcache_cli.app import app


def embedcache(*arguments: str) -> dict[str, Any]:
    """Run one command with ``--json`` in this process and return its output.

    A process for each command would load torch and start CUDA twenty times.
    """
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(f"embedcache {' '.join(arguments)}: {done.stderr}")
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def extract(source: str, cache: Path, *, base: str, flags: list[str]) -> dict[str, Any]:
    """Extract one corpus. A complete cache is left unchanged."""
    summary = embedcache("extract", source, "--base", base, "--out", str(cache), *flags)
    summary.pop("corpus")
    print(json.dumps(summary), flush=True)
    return summary


def gsm8k_files(train: Path, test: Path, out: Path) -> tuple[str, list[str]]:
    """Write the first 7,000 training problems as train and the rest as dev.

    Returns the corpus and the flags of ``embedcache extract``. Each problem is one sequence, with
    the loss on its answer only. The space belongs to the answer: a prompt that ends in a space is
    tokenised in a way that no text has.
    """
    with train.open(encoding="utf-8") as file:
        (out / "train.jsonl").write_text("".join(itertools.islice(file, 7000)), "utf-8")
        (out / "dev.jsonl").write_text("".join(file), "utf-8")
    flags = ["--dev", str(out / "dev.jsonl"), "--test", str(test)]
    flags += ["--prompt", "Question: {question}\\nAnswer:", "--completion", " {answer}"]
    return str(out / "train.jsonl"), flags
