"""Training on a GPU: one carry-on, and many stacked, against LoRA on the live base.

One carry-on of r=256, and 64 stacked ones of r=64, are trained with the exact loss and with
shortlists. LoRA (PEFT, r=16, all linear layers, bfloat16) is trained with the same batch size and
loss code; with ``--compile-lora`` also with torch.compile, and the faster one counts. Speeds
include the optimiser and exclude evaluation. The second run of each kind is measured, so that
kernels are compiled. Some of the stacked carry-ons are also trained alone, and both are scored on
test.

    pip install peft
    python tests/benchmarks/bench_train_gpu.py [--tokens 2000000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_train import CARRY_ONS, lora_tokens_per_second
from record import record, row

from embedcache.cache.cache import Cache
from embedcache.carryon.branch.config import BranchConfig
from embedcache.corpus.config import CorpusConfig
from embedcache.evaluation.evaluate import evaluate
from embedcache.extraction.extract import extract
from embedcache.training.config import TrainConfig
from embedcache.training.train import sweep, train

STEP = 16_384
EPOCHS = 4
"""Epochs of each carry-on in the totals, and the default for stacked carry-ons."""
WIDE, NARROW = BranchConfig(width=256, gate=False), BranchConfig(width=64)


def test_loss(out: Path, cache: Path) -> float:
    """Return the cross-entropy of a carry-on on test."""
    return float(evaluate(out, cache).rows[0]["cross_entropy"])


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--stacked", type=int, default=64)
    parser.add_argument("--stacked-epochs", type=int, default=EPOCHS)
    parser.add_argument("--alone", type=int, default=3)
    parser.add_argument("--compile-lora", action="store_true")
    parser.add_argument("--lora-steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    command = "python tests/benchmarks/bench_train_gpu.py " + " ".join(sys.argv[1:])
    shared: dict[str, Any] = {"command": command.strip()}
    folder = Path(tempfile.mkdtemp())
    path = folder / "cache"
    corpus = CorpusConfig(sources=(options.corpus,), limit_tokens=options.tokens)
    extracted = extract(corpus, base=options.base, out=path)
    cache = Cache(path)
    rates: dict[str, float] = {}
    waits: dict[str, float] = {}
    config = TrainConfig(carryon=WIDE, epochs=options.epochs, batch_tokens=STEP)
    for loss in ("shortlist", "exact"):
        first = replace(config, loss=loss, epochs=1)
        train(path, out=folder / f"{loss}-first", config=first)
        result = train(path, out=folder / loss, config=replace(config, loss=loss))
        rates[loss] = result.tokens_per_second
        print(loss, f"{rates[loss]:,.0f} tokens/s, dev {result.best_dev}", flush=True)
        waits[loss] = result.data_wait
        print(f"waits for data {waits[loss]:.1%}", flush=True)
    loras = {}
    for compiled in (False, True) if options.compile_lora else (False,):
        try:
            loras[compiled] = lora_tokens_per_second(
                options.base,
                cache,
                options.lora_steps,
                "bfloat16",
                batch_tokens=STEP,
                compiled=compiled,
            )
        except Exception as error:  # noqa: BLE001
            print(f"LoRA, compiled {compiled}: {error!r}"[:500], flush=True)  # the peer may fail
    print({f"compiled {key}": f"{rate:,.0f} tokens/s" for key, rate in loras.items()}, flush=True)
    lora = max(loras.values(), default=float("nan"))
    narrow = replace(config, carryon=NARROW, order_seed=0, epochs=options.stacked_epochs)
    configs = [replace(narrow, seed=seed) for seed in range(options.stacked)]
    few = (cache.split("train").documents[0],)
    for loss in ("shortlist", "exact"):
        first = {  # compiles the kernels
            folder / f"{loss}-{number}-first": replace(one, loss=loss, epochs=1, documents=few)
            for number, one in enumerate(configs)
        }
        sweep(path, runs=first)
        runs = {
            folder / f"{loss}-{number}": replace(one, loss=loss)
            for number, one in enumerate(configs)
        }
        results = sweep(path, runs=runs)
        failed = {str(one.failure) for one in results if one.failure is not None}
        if failed:
            raise SystemExit("\n".join(sorted(failed)))
        found = [one.summary for one in results if one.summary is not None]
        if len(found) < len(runs) or len({one.seconds for one in found}) > 1:
            raise SystemExit("expected all in one stack: fewer --stacked, or a larger GPU")
        rates[f"stacked {loss}"] = sum(one.tokens for one in found) / found[0].seconds
        print("stacked", loss, f"{rates[f'stacked {loss}']:,.0f} tokens/s in all", flush=True)
    worst: dict[str, float] = {}
    for number, one in enumerate(configs[: options.alone]):
        train(path, out=folder / f"alone-{number}", config=replace(one, loss="exact"))
        alone = test_loss(folder / f"alone-{number}", path)
        for loss in ("shortlist", "exact"):
            off = test_loss(folder / f"{loss}-{number}", path) / alone - 1
            worst[loss] = max(worst.get(loss, off), off, key=abs)
    print({loss: f"{off:+.3%} of test" for loss, off in worst.items()}, flush=True)
    peer = {"peer": "PEFT LoRA r=16, all linear layers, on the base", "peer_value": lora}
    rows = [
        row(f"training {what}, {loss} loss", rates[key + loss], "tokens/s", **peer, **shared)
        for what, key in (
            (f"one carry-on, r=256, {options.epochs} epochs", ""),
            (
                f"{options.stacked} stacked carry-ons, r=64, {options.stacked_epochs} epochs",
                "stacked ",
            ),
        )
        for loss in ("shortlist", "exact")
    ]
    for loss, share in waits.items():
        name = f"waits for data of one carry-on, r=256, {loss} loss"
        rows.append(
            row(name, share, "of the time", peer="time of training", peer_value=1, **shared)
        )
    for loss, off in worst.items():
        name = f"test cross-entropy of stacked carry-ons, {loss} loss, largest difference"
        alone = "the same carry-on alone, exact loss"
        rows.append(row(name, 1 + off, "of alone", peer=alone, peer_value=1, **shared))
    tokens = cache.split("train").manifest.tokens
    for count in CARRY_ONS:
        epochs = count * EPOCHS * tokens
        # One carry-on is trained alone; several are stacked.
        rate = rates["shortlist"] if count == 1 else rates["stacked shortlist"]
        what = f"{count:,} carry-on{'s' * (count > 1)} of {EPOCHS} epochs, extraction included"
        total = extracted.seconds + epochs / rate
        peer["peer_value"] = epochs / lora
        rows.append(row(what, total, "s, by these speeds", **peer, **shared))
    record("train_gpu", rows, options.results)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none; use bench_train.py on a CPU")
    main()
