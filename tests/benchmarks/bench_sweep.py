"""A sweep of a hundred carry-ons, each on its own documents, in one pass over one cache.

The peers are a hundred processes of ``embedcache train`` and a hundred calls of `train` in one
process. Both are timed on the first few runs and multiplied. The base is cut to two layers, because
the cost of a carry-on depends only on widths. There is no dev split.

    python tests/benchmarks/bench_sweep.py [--carry-ons 100] [--tokens-each 5000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from embedcache.base.load import load_base
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.sources.folders import library_files
from embedcache.extraction.extract import extract
from embedcache.training.config import TrainConfig
from embedcache.training.train import sweep, train

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

DOCUMENTS = 5
BYTES_PER_TOKEN = 3.3
LAYERS = 2


def write_users(folder: Path, users: int, tokens_each: int) -> None:
    """Cut the text of the standard library into ``DOCUMENTS`` documents for each user."""
    size = int(tokens_each * BYTES_PER_TOKEN / DOCUMENTS)
    text = "".join(path.read_text(errors="replace") for path, _ in library_files())
    for number in range(users * DOCUMENTS):
        path = folder / f"{number // DOCUMENTS:04}" / f"{number % DOCUMENTS}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[number * size : (number + 1) * size])


def cut_base(name: str, folder: Path) -> None:
    """Save the base with only its first ``LAYERS`` layers."""
    base = load_base(name, device="cpu", dtype="float32")
    whole: Any = base.model
    whole.config.num_hidden_layers = LAYERS
    short = type(whole)(whole.config)
    short.load_state_dict(whole.state_dict(), strict=False)
    short.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--carry-ons", type=int, default=100)
    parser.add_argument("--tokens-each", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--peers", type=int, default=4, help="timed runs of each peer")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    users: int = options.carry_ons
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_users(folder / "users", users, options.tokens_each)
        cut_base(options.base, folder / "base")
        cache = folder / "cache"
        corpus = CorpusConfig(sources=(str(folder / "users"),), dev_fraction=0.0, test_fraction=0.0)
        summary = extract(corpus, base=str(folder / "base"), out=cache)
        each = summary.tokens["train"] / users
        runs = {
            f"{user:04}": TrainConfig(epochs=options.epochs, documents=(f"{user:04}/*",))
            for user in range(users)
        }
        few = list(runs)[: options.peers]

        started = time.perf_counter()
        sweep(cache, runs={folder / "all" / user: config for user, config in runs.items()})
        together = time.perf_counter() - started
        print(f"{users} stacked: {together:.1f} s", flush=True)

        started = time.perf_counter()
        for user in few:
            train(cache, out=folder / "loop" / user, config=runs[user])
        loop = (time.perf_counter() - started) / len(few) * users
        print(f"{users} in one process, by {len(few)}: {loop:.1f} s", flush=True)

        started = time.perf_counter()
        for user in few:
            command = [sys.executable, "-m", "embedcache_cli", "train", str(cache), "--out"]
            command += [str(folder / "processes" / user), "--epochs", str(options.epochs)]
            subprocess.run([*command, "--document", f"{user}/*"], check=True, capture_output=True)
        processes = (time.perf_counter() - started) / len(few) * users
        print(f"{users} processes, by {len(few)}: {processes:.1f} s", flush=True)

    told = ("python tests/benchmarks/bench_sweep.py " + " ".join(sys.argv[1:])).strip()
    what = f"{users} carry-ons of {each:,.0f} tokens, {options.epochs} epochs, r=64"
    peers = {
        f"{users} runs in one process, by {len(few)} of them": loop,
        f"{users} processes, by {len(few)} of them": processes,
    }
    rows = [
        row(what, together, "s", peer=peer, peer_value=seconds, command=told)
        for peer, seconds in peers.items()
    ]
    record("sweep_gpu" if torch.cuda.is_available() else "sweep_cpu", rows, options.results)


if __name__ == "__main__":
    main()
