"""Extracting and reading take the memory that they take, however long the corpus is.

Each size is a process of its own, whose peak is the kernel's count (VmHWM). A tiny random base of
width 32 leaves nothing to hide behind: the peak is that of the libraries and of one block.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fixtures_extract import TEXT
from support.tiny import tiny_base_directory

TOKENS_A_WORD = 1.9
MEASURED = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from embedcache.cache.format.layout import ExtractSettings
from embedcache.data.loader import BatchLoader
from embedcache.cache.cache import Cache
from embedcache.corpus.config import CorpusConfig
from embedcache.extraction.extract import extract

corpus, base, out, what = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
if "extract" in what:
    settings = ExtractSettings(context=256, block_tokens=4096, batch_tokens=4096)
    config = CorpusConfig(sources=(str(corpus),), context=256)
    done = extract(config, base=base, out=out, settings=settings, device="cpu", dtype="float32")
    tokens = sum(done.tokens.values())
if "read" in what:
    split = Cache(out).split("train")
    loader = BatchLoader(split, batch_tokens=4096, taps=("final",))
    tokens = sum(batch.tokens for batch in loader.epoch(0))
    assert tokens == split.manifest.tokens
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(line for line in lines if line.startswith("VmHWM"))
print(json.dumps([tokens, int(peak.split()[1])]))
"""


def write_corpus(path: Path, tokens: int) -> None:
    draw, words = random.Random(0), TEXT.split()
    with path.open("w") as file:
        left = tokens / TOKENS_A_WORD
        while left > 0:
            count = draw.randint(20, 300)
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=count))}) + "\n")
            left -= count


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    return tiny_base_directory(tmp_path_factory.mktemp("memory") / "base")


def peak(folder: Path, base: Path, tokens: int, what: str) -> int:
    """Return the peak, in KB, of a process that extracts and reads about so many tokens."""
    corpus, out = folder / f"{tokens}.jsonl", folder / str(tokens)
    if not corpus.is_file():
        write_corpus(corpus, tokens)
    command = [sys.executable, "-c", MEASURED, str(corpus), str(base), str(out), what]
    # One arena: how many malloc keeps depends on how threads are scheduled.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found, size = json.loads(done.stdout)
    assert 0.7 < found / tokens < 1.3
    return size


def test_four_times_the_tokens_take_the_same_memory(base: Path, tmp_path: Path) -> None:
    """Within 12 MB: 40 bytes kept of each token would be found, were it while extracting."""
    with ThreadPoolExecutor() as both:
        few, many = both.map(
            lambda tokens: peak(tmp_path, base, tokens, "extract, read"), (100_000, 400_000)
        )
    assert abs(many - few) < 12_000


@pytest.mark.slow
def test_a_hundred_times_the_tokens_take_the_same_memory(base: Path, tmp_path: Path) -> None:
    """Within 40 MB: 4 bytes a token. Two minutes on two cores that are idle.

    What there is of growth is the index of near-duplicates: some 0.6 KB a document until SQLite's
    cache of that is full, at 64 MiB.
    """
    for what in ("extract", "read"):
        few, many = (peak(tmp_path, base, tokens, what) for tokens in (100_000, 10_000_000))
        print(f"{what}: {few:,} KB for 10^5 tokens, {many:,} KB for 10^7")
        assert abs(many - few) < 40_000
