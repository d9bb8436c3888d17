"""Helpers for tests of stage one: corpora, requests, trees of files, and the real command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from embedcache.cache.format.layout import ExtractSettings
from embedcache.corpus.config import CorpusConfig

TEXT = "the quick brown fox jumps over a lazy dog and capital of France is Paris def return"


def write_documents(folder: Path, count: int = 10, words: int = 60, seed: int = 0) -> Path:
    """Write ``count`` documents of different words, so that none is a near-duplicate."""
    draw, vocabulary = random.Random(seed), TEXT.split()
    folder.mkdir(parents=True)
    for number in range(count):
        text = " ".join(draw.choices(vocabulary, k=draw.randint(words // 2, words * 3 // 2)))
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def corpus_config(folder: Path, **changes: Any) -> CorpusConfig:
    settings = {"context": 64, "dev_fraction": 0.2, "test_fraction": 0.2} | changes
    return CorpusConfig(sources=(str(folder),), **settings)


def small_settings(**changes: Any) -> ExtractSettings:
    return ExtractSettings(**{"context": 64, "block_tokens": 256, "batch_tokens": 256} | changes)


def small_flags(corpus: Path, base: Path, out: Path) -> list[str]:
    """Return the command line of `corpus_config` and `small_settings`."""
    paths = ["extract", str(corpus), "--base", str(base), "--out", str(out), "--device", "cpu"]
    paths += ["--dtype", "float32"]  # as `conftest` has it for all of this process
    sizes = ["--context", "64", "--block-tokens", "256", "--batch-tokens", "256"]
    return [*paths, *sizes, "--dev-fraction", "0.2", "--test-fraction", "0.2"]


def start_command(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    """Start ``python -m embedcache_cli`` in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "embedcache_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        # A shell's background jobs ignore it, and so would what is started from them.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def extract_small(place: Path, out: Path) -> None:
    """Extract ``place``/corpus with `corpus_config` and `small_settings`, in a process."""
    from embedcache.extraction.extract import extract

    extract(
        corpus_config(place / "corpus"),
        base=str(place / "base"),
        out=out,
        settings=small_settings(),
        device="cpu",
        dtype="float32",
    )


def call_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command's own ``main`` in this process and return its exit code."""
    from embedcache_cli.app import main

    monkeypatch.setattr(sys, "argv", ["embedcache", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def comparable_tree(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache without what differs from run to run: times and attempts."""
    tree = {}
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache).as_posix()
        if not path.is_file() or name == ".lock":
            continue
        data = path.read_bytes()
        if name.startswith("commits/") or name == "manifest.json":
            value = json.loads(data)
            for key in ("attempt", "extracted", "sha256"):
                value.pop(key, None)
            data = json.dumps(value, sort_keys=True).encode()
        tree[name] = data
    return tree


def content(cache: Path) -> dict[str, bytes]:
    """Return every file except the markers, which state a generation and an attempt."""
    tree = comparable_tree(cache)
    return {name: data for name, data in tree.items() if not name.startswith("commits/")}


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
