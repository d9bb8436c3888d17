"""Training on all GPUs of one machine, against one GPU.

Four cases share a cache: a carry-on of r=256 with the same tokens a step in total; the same with
as many tokens a step on each GPU; a carry-on of r=1,728 (74 M parameters); and a sweep of 128
carry-ons of r=64. Each case runs under ``torchrun``. The second run is measured, so that kernels
are compiled. Speeds include the optimiser and exclude evaluation.

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
from embedcache.extraction.extract import extract

SWEPT = 128


CHILD = """
import json, sys
from pathlib import Path
from embedcache.training.train import sweep, train
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import is_leader

cache, out, settings, seeds = sys.argv[1:]
config = json.loads(settings)
few = config | {"epochs": 1}

def runs(kind, config):
    configs = [config | {"seed": seed, "order_seed": 0} for seed in range(int(seeds))]
    made = map(TrainConfig.from_dict, configs)
    return {Path(out) / f"{kind}-{seed}": one for seed, one in enumerate(made)}

if int(seeds):
    sweep(Path(cache), runs=runs("first", few), device="cuda")
    found = [one.summary for one in sweep(Path(cache), runs=runs("then", config), device="cuda")]
else:
    train(Path(cache), out=Path(out) / "first", config=TrainConfig.from_dict(few), device="cuda")
    config = TrainConfig.from_dict(config)
    found = [train(Path(cache), out=Path(out) / "then", config=config, device="cuda")]
if is_leader():
    print(json.dumps([[one.tokens, one.seconds] for one in found]))
"""


def rate(gpus: int, cache: Path, settings: dict[str, Any], swept: int) -> float:
    """Return the tokens a second of training on ``gpus`` GPUs.

    ``swept`` is the number of carry-ons of a sweep, or 0. Stacks on one GPU run one after another.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(gpus), "--no-python", sys.executable, "-c", CHILD),
        *(str(cache), tempfile.mkdtemp(dir=cache.parent), json.dumps(settings), str(swept)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    seconds = [{one[1] for one in found[gpu :: gpus if swept else 1]} for gpu in range(gpus)]
    return float(sum(one[0] for one in found) / max(map(sum, seconds)))


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
    cache = folder / "cache"
    corpus = CorpusConfig(sources=(options.corpus,), limit_tokens=options.tokens)
    extract(corpus, base=options.base, out=cache)
    settings = {"batch_tokens": 16_384, "patience": 99}
    one = settings | {"epochs": options.epochs, "carryon": {"width": 256, "gate": False}}
    large = settings | {"epochs": 4, "lr": 5e-4, "carryon": {"width": 1728}}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
        # settings on one GPU, settings on all GPUs, number of carry-ons of a sweep
        "one carry-on, r=256, 16,384 tokens a step": (one, one, 0),
        "the same, 16,384 tokens a step and GPU": (one, one | {"batch_tokens": 16_384 * gpus}, 0),
        "one carry-on, r=1,728, 16,384 tokens a step": (large, large, 0),
        f"{SWEPT} carry-ons, r=64, swept": (settings | {"epochs": 4},) * 2 + (SWEPT,),
    }
    rows = []
    for name, (alone, shared, swept) in cases.items():
        peer, found = rate(1, cache, alone, swept), rate(gpus, cache, shared, swept)
        what = {"peer": "one GPU", "peer_value": peer, "command": command.strip()}
        rows.append(row(f"{name}, {gpus} GPUs", found, "tokens/s", **what))
        record("devices_gpu", rows, options.results)


if __name__ == "__main__":
    main()
