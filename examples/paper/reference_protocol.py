"""The reference protocol: held-out cross-entropy of base and carry-ons on two corpora, on one GPU.

- The Python standard library is split by file and cut into windows of at most 1,024 tokens.
- GSM8K has one problem a sequence and the loss on the answer only. The first 7,000 training
  problems are train, the rest are dev, and the test file is test.

Dev chooses the learning rate (of two) and the epoch. Test is only reported.

    python examples/paper/reference_protocol.py --out runs/reference \\
        --stdlib FOLDER --split-file split.json --gsm8k-train train.jsonl --gsm8k-test test.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from commands import embedcache, extract, gsm8k_files

VARIANTS = {
    "r=64, gate": ["--width", "64"],
    "r=256, no gate": ["--width", "256", "--no-gate"],
    "r=256, gate, token ids": ["--width", "256", "--token-input"],
}
RATES = ("2e-3", "4e-3")
TRAIN = ["--epochs", "4", "--batch-tokens", "16384", "--patience", "4"]


def train(cache: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Train at each learning rate; return the summary of the run with the best dev loss."""
    runs = []
    for rate in RATES:
        out = f"{folder}-lr={rate}"
        runs.append(embedcache("train", str(cache), "--out", out, "--lr", rate, *TRAIN, *flags))
        runs[-1]["lr"] = rate
    return min(runs, key=lambda run: float(run["best_dev"]))


def evaluate_variants(name: str, cache: Path, out: Path, report: dict[str, Any]) -> None:
    """Train every variant on a cache and score it on test; append each row to ``results.json``."""
    for label, flags in VARIANTS.items():
        started = time.perf_counter()
        folder = out / f"{name}-{label.replace(', ', '-').replace(' ', '_')}"
        trained = train(cache, folder, flags)
        found = embedcache("eval", trained["out"], str(cache))
        row = found["rows"][0]
        report["rows"].append(
            {
                "corpus": name,
                "carry-on": label,
                "parameters": trained["parameters"],
                "lr": trained["lr"],
                "base_test": round(found["base_cross_entropy"], 4),
                "test": round(row["cross_entropy"], 4),
                "difference": round(row["difference"], 4),
                "interval": [round(row["low"], 4), round(row["high"], 4)],
                "dev": round(trained["best_dev"], 4),
                "kept_epoch": trained["best_epoch"],
                "train_seconds": round(trained["seconds"], 1),
                "wall_seconds_both_rates": round(time.perf_counter() - started, 1),
                "train_tokens_per_second": round(trained["tokens_per_second"]),
            }
        )
        print(json.dumps(report["rows"][-1]), flush=True)
        (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    """Measure both corpora."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--stdlib", default="stdlib:", help="folder, or stdlib: for this Python's")
    parser.add_argument("--split-file", help="JSON of file names by split")
    parser.add_argument("--gsm8k-train", type=Path)
    parser.add_argument("--gsm8k-test", type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    split = ["--split-file", options.split_file] if options.split_file else []
    report: dict[str, Any] = {"extract": {}, "rows": []}
    cache = out / "stdlib.cache"
    report["extract"]["stdlib"] = extract(options.stdlib, cache, base=options.base, flags=split)
    evaluate_variants("stdlib", cache, out, report)
    if options.gsm8k_train:
        source, flags = gsm8k_files(options.gsm8k_train, options.gsm8k_test, out)
        cache = out / "gsm8k.cache"
        report["extract"]["gsm8k"] = extract(source, cache, base=options.base, flags=flags)
        evaluate_variants("gsm8k", cache, out, report)


if __name__ == "__main__":
    main()
