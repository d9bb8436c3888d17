"""A cache of a million blocks is opened, and trained on, at the cost of the blocks that are used.

The costs are counted, not timed: files opened, bytes read, memory, calls of Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World
from support.synthetic import lengthened

from embedcache.cache.cache import Cache
from embedcache.data.loader import BatchLoader
from embedcache.data.order import WINDOW
from embedcache.errors import CacheError

BLOCKS = 1_000_000
SEED, EPOCH = 3, 2
MEASURED = """
import json, sys, threading, tracemalloc
from pathlib import Path
from embedcache.data.loader import BatchLoader
from embedcache.cache.cache import Cache
from embedcache.data.sample import sample_embeddings

path, seed, epoch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
opened, calls = [], [0]

def count(frame, event, argument):
    calls[0] += event == "call"

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

list(BatchLoader(Cache(path).split("dev"), batch_tokens=64, taps=("final",)).epoch(0))  # imports
sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" else None)
tracemalloc.start()
threading.setprofile(count)
sys.setprofile(count)
found, before = {}, read()

def note(name):
    sys.setprofile(None)
    found[name] = {"files": len(opened), "bytes": read() - before, "calls": calls[0],
                   "peak": tracemalloc.get_traced_memory()[1]}
    sys.setprofile(count)

split = Cache(path).split("train")
note("opened")
batches = BatchLoader(split, batch_tokens=64, taps=("final",), seed=seed).epoch(epoch)
batch = next(batches)
note("first batch")
batches.close()
found["sequences"] = batch.sequences
print(json.dumps(found))
"""


def first_blocks(count: int) -> list[int]:
    return np.random.default_rng([SEED, EPOCH]).permutation(BLOCKS)[:count].tolist()


@pytest.fixture(scope="module")
def million(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the files of three windows: the one that is trained on and two read ahead."""
    path = tmp_path_factory.mktemp("million") / "cache"
    return lengthened(world.cache_path, path, BLOCKS, first_blocks(3 * WINDOW))


@pytest.fixture(scope="module")
def measured(million: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURED, str(million), str(SEED), str(EPOCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_opening_reads_kilobytes(measured: dict[str, Any], million: Path, world: World) -> None:
    found = measured["opened"]
    assert found["files"] < 100
    assert found["bytes"] < 300_000
    assert found["peak"] < 3e6
    assert found["calls"] < 50_000
    size = (million / "manifest.json").stat().st_size
    assert size < (world.cache_path / "manifest.json").stat().st_size + 100


def test_the_first_batch_costs_its_window(measured: dict[str, Any]) -> None:
    """Two windows are planned and read, and a permutation takes 8 bytes a block."""
    found = measured["first batch"]
    assert found["files"] < 1000
    assert found["bytes"] < 16e6
    assert found["peak"] < 8 * BLOCKS + 16e6
    assert found["calls"] < 200_000


def test_blocks_are_those_of_the_small_cache(million: Path, world: World) -> None:
    long, small = Cache(million).split("train"), world.cache().split("train")
    assert long.manifest.blocks == BLOCKS
    for number in first_blocks(WINDOW):
        found, expected = long.block(number), small.block(number % small.manifest.blocks)
        for part in ("ids_N", "loss_mask_N", "rows_S2", "document_S"):
            assert np.array_equal(getattr(found, part), getattr(expected, part))
        assert found.x_NH["final"].equal(expected.x_NH["final"])
        first = found.sequence_S[0] - expected.sequence_S[0]
        assert np.array_equal(found.sequence_S, expected.sequence_S + first)
    with pytest.raises(CacheError, match=r"is missing"):
        long.block(next(b for b in range(9999, BLOCKS) if b not in first_blocks(3 * WINDOW)))


def test_ranks_start_with_the_same_window(million: Path, measured: dict[str, Any]) -> None:
    split = Cache(million).split("train")
    loader = BatchLoader(split, batch_tokens=64, taps=("final",), seed=SEED, rank=0, ranks=4)
    batches = loader.epoch(EPOCH)
    assert next(batches).sequences == tuple(measured["sequences"])
    batches.close()


def test_an_edited_page_is_found_when_it_is_used(million: Path, tmp_path: Path) -> None:
    used, other = first_blocks(2)
    path = million / "digests/train/embeddings"
    data = path.read_bytes()
    changed = bytearray(data)
    changed[used * 44] ^= 1
    path.write_bytes(changed)
    try:
        split = Cache(million).split("train")
        split.block(other)
        with pytest.raises(CacheError, match=rf"fails the SHA-256 of page {used // 256}"):
            split.block(used)
    finally:
        path.write_bytes(data)
