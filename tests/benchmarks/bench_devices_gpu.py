"""Training spread over the GPUs of one machine, against one of them.

One script, one cache: a carry-on of r=256, with a step's tokens shared out, and with as many on
each GPU; one of r=1,728 (74 M parameters); and a sweep of 128 of r=64, dealt out. Every run is the
product's command under ``torchrun``, in processes of its own; speeds have the optimiser in them and
no evaluation.

    python tests/benchmarks/bench_devices_gpu.py [--tokens 2000000] [--gpus 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

from embedcache.corpus.config import CorpusConfig
from embedcache.extract import extract

SWEPT = 128
WIDE, LARGE = ["--width", "256", "--no-gate"], ["--width", "1728", "--lr", "5e-4"]


def torchrun(gpus: int, *arguments: str) -> Any:
    """Run ``embedcache train`` in so many processes; return what it printed."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(gpus), "-m", "embedcache_cli", "train", *arguments, "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def swept_rate(rows: list[dict[str, Any]], gpus: int) -> float:
    """Return the tokens a second of a sweep by ``seed``, dealt out: stacks of a GPU take turns."""
    seconds: list[set[float]] = [set() for _ in range(gpus)]
    for one in rows:
        seconds[int(one["name"].partition("=")[2]) % gpus].add(one["results"]["seconds"])
    return float(sum(one["results"]["tokens"] for one in rows) / max(map(sum, seconds)))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    command = "python tests/benchmarks/bench_devices_gpu.py " + " ".join(sys.argv[1:])
    gpus: int = options.gpus
    if gpus < 2:
        raise SystemExit(f"expected two GPUs or more, found {torch.cuda.device_count()}")
    folder = Path(tempfile.mkdtemp())
    cache = str(folder / "cache")
    corpus = CorpusConfig(sources=(options.corpus,), limit_tokens=options.tokens)
    extract(corpus, base=options.base, out=Path(cache))
    seeds = ", ".join(map(str, range(SWEPT)))
    (folder / "sweep.toml").write_text(f"order_seed = 0\n[grid]\nseed = [{seeds}]\n")

    def rate(number: int, *flags: str, epochs: int = options.epochs, step: int = 16_384) -> float:
        """Return the tokens a second of one carry-on on so many GPUs."""
        out = tempfile.mkdtemp(dir=folder)
        common = ["--epochs", str(epochs), "--batch-tokens", str(step), "--patience", "99"]
        found = torchrun(number, cache, "--out", out, *common, *flags)
        if isinstance(found, list):
            return swept_rate(found, number)
        print(number, *flags, step, f"waits {found['data_wait']:.1%}", flush=True)
        return float(found["tokens_per_second"])

    sweep = ["--sweep", str(folder / "sweep.toml")]
    rate(1, *WIDE, epochs=1)  # kernels are compiled, for all
    cases: dict[str, tuple[list[str], int, int, int]] = {
        # flags, epochs, tokens of a step on one GPU, and on all
        "one carry-on, r=256, 16,384 tokens a step": (WIDE, options.epochs, 16_384, 16_384),
        "the same, 16,384 tokens a step and GPU": (WIDE, options.epochs, 16_384, 16_384 * gpus),
        "one carry-on, r=1,728, 32,768 tokens a step": (LARGE, 4, 32_768, 32_768),
        f"{SWEPT} carry-ons, r=64, swept": (sweep, 4, 16_384, 16_384),
    }
    rows, alone = [], dict[str, float]()
    for name, (flags, epochs, step, step_of_all) in cases.items():
        key = f"{flags} {epochs} {step}"
        if key not in alone:
            alone[key] = rate(1, *flags, epochs=epochs, step=step)
        found = rate(gpus, *flags, epochs=epochs, step=step_of_all)
        print(f"{name}: {alone[key]:,.0f} and {found:,.0f} tokens/s", flush=True)
        peer = {"peer": "one of them", "peer_value": alone[key], "command": command.strip()}
        rows.append(row(f"{name}, {gpus} GPUs", found, "tokens/s", **peer))
        record("devices_gpu", rows, options.results)


if __name__ == "__main__":
    main()
