"""Reading blocks, against zarr-python and tensorstore on the same files.

Real embeddings are stored by each codec and read from the page cache. The rates are decoded bytes a
second on one core and on two; the process is pinned to these cores. For ``transform`` the entropy
decoder is measured alone, and the matrix products of its inverse are measured apart.

    python tests/benchmarks/bench_reader.py [--blocks 4]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
import zarr

from embedcache.cache.cache import Cache
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS, STATELESS, Codec
from embedcache.cache.format.arrays import chunk_rows, create_arrays
from embedcache.cache.format.layout import ExtractSettings, shard_name
from embedcache.cache.shards.shard import read_shard, write_shard
from embedcache.corpus.config import CorpusConfig
from embedcache.extraction.extract import extract

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

Array = np.ndarray[Any, Any]
TAP = "final"


def store(folder: Path, name: str, codec: Codec, x_NH: torch.Tensor, ids_N: Array, R: int) -> Path:
    """Write all rows with one codec, in blocks of R rows; return the folder."""
    blocks, hidden = len(x_NH) // R, x_NH.shape[1]
    group = zarr.create_group(folder / name, zarr_format=3)
    specs = ARRAYS[name]
    arrays = {f"{spec.group}/{TAP}": spec for spec in specs}
    create_arrays(group, arrays, blocks=blocks, block_tokens=R, hidden=hidden)
    for block in range(blocks):
        rows = slice(block * R, (block + 1) * R)
        stored = codec.encode(x_NH[rows], ids_N[rows])
        for spec in specs:
            path = folder / name / shard_name(f"{spec.group}/{TAP}", block, 1 + spec.wide)
            values = stored[spec.group].numpy()
            write_shard(path, values, chunk_rows(spec, R), CODERS[spec.coder])
    return folder / name


def read_ours(folder: Path, name: str, block: int, hidden: int, R: int) -> None:
    """Read every array of a block as the library does."""
    for spec in ARRAYS[name]:
        read_shard(
            folder / shard_name(f"{spec.group}/{TAP}", block, 1 + spec.wide),
            rows=R,
            columns=(hidden,) if spec.wide else (),
            dtype=spec.dtype,
            chunk_rows=chunk_rows(spec, R),
            chunks=R // chunk_rows(spec, R),
            coder=CODERS[spec.coder],
        )


def best(work: Callable[[], object], rounds: int = 5) -> float:
    """Return the shortest time of several rounds, in seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def by_tensorstore(folder: Path, name: str) -> Callable[[], object]:
    """Return a function that reads all arrays of a codec with tensorstore."""
    stores = [
        tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(folder / spec.group / TAP)},
            },
            open=True,
        ).result()
        for spec in ARRAYS[name]
    ]
    return lambda: [each.read().result() for each in stores]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    R = ExtractSettings().block_tokens
    entries = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        corpus = CorpusConfig(
            sources=(options.corpus,), limit_tokens=R, dev_fraction=0.0, test_fraction=0.0
        )
        extract(
            corpus,
            base=options.base,
            out=root / "cache",
            settings=ExtractSettings(codec="transform", bits=1.5),
        )
        split = Cache(root / "cache").split("train")
        block = split.block(0)
        repeat = -(-R * options.blocks // len(block.ids_N))
        x_NH = block.x_NH[TAP].repeat(repeat, 1)[: R * options.blocks]
        ids_N = np.tile(block.ids_N, repeat)[: R * options.blocks]
        hidden = x_NH.shape[1]
        command = "python tests/benchmarks/bench_reader.py " + " ".join(sys.argv[1:])
        codecs = {**STATELESS, "transform": split.codecs[TAP]}
        for name, codec in codecs.items():
            folder = store(root, name, codec, x_NH, ids_N, R)
            values = x_NH.numel()
            size = values * np.dtype(ARRAYS[name][0].dtype).itemsize
            amount, unit = (
                (values / 1e6, "M values/s")
                if name == "transform"
                else (
                    size / 1e9,
                    "GB/s",
                )
            )

            def all_blocks(
                pool: ThreadPoolExecutor, name: str = name, folder: Path = folder
            ) -> None:
                list(
                    pool.map(lambda b: read_ours(folder, name, b, hidden, R), range(options.blocks))
                )

            rates = []
            for count in (1, 2)[: len(cores)]:
                os.sched_setaffinity(0, cores[:count])
                torch.set_num_threads(1)
                with ThreadPoolExecutor(count) as pool:
                    rates.append(amount / best(lambda: all_blocks(pool)))
            os.sched_setaffinity(0, cores[:1])
            arrays = [zarr.open_array(folder / spec.group / TAP, mode="r") for spec in ARRAYS[name]]
            peers = {"zarr-python": lambda: [array[:] for array in arrays]}  # noqa: B023
            if name != "transform":
                peers["tensorstore"] = by_tensorstore(folder, name)
            for peer, work in peers.items():
                entries.append(
                    row(
                        f"reading {name}, one core",
                        rates[0],
                        unit,
                        peer=f"{peer}, same files and core",
                        peer_value=amount / best(work),
                        command=command.strip(),
                    )
                )
            os.sched_setaffinity(0, cores)
            if len(rates) > 1:
                entries.append(
                    row(
                        f"reading {name}, two cores",
                        rates[1],
                        unit,
                        peer="one core",
                        peer_value=rates[0],
                        command=command.strip(),
                    )
                )
        os.sched_setaffinity(0, cores[:1])
        stored = codecs["transform"].encode(x_NH[:R], ids_N[:R])
        seconds = best(lambda: codecs["transform"].decode(stored, ids_N[:R]))
        os.sched_setaffinity(0, cores)
        entries.append(
            row(
                "inverse of transform (two matrix products), one core",
                R * hidden / 1e6 / seconds,
                "M values/s",
                peer="entropy decoding, one core",
                peer_value=next(e["value"] for e in entries if "transform" in e["name"]),
                command=command.strip(),
            )
        )
    record("reader_cpu", entries, options.results)


if __name__ == "__main__":
    main()
