"""Cost of the codec: carry-ons trained on coded embeddings against carry-ons trained on exact ones.

Each corpus is extracted losslessly and with each lossy codec. The same carry-on (r=256) is trained
on each cache with several seeds and scored on the lossless test split. Differences are paired by
seed. Bits count all files of the train embeddings: indexes, checksums, scales, and the calibration.

    python examples/paper/codec_quality.py --out runs/codec \\
        --stdlib FOLDER --split-file split.json --gsm8k-train train.jsonl --gsm8k-test test.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from commands import embedcache, extract, gsm8k_files

LOSSLESS = "bf16"
CODECS = {
    LOSSLESS: [],
    "int8": ["--codec", "int8"],
    "transform, 2.95 bits": ["--codec", "transform", "--bits", "2.95"],
    "transform, 1.47 bits": ["--codec", "transform", "--bits", "1.47"],
    "transform, 0.98 bits": ["--codec", "transform", "--bits", "0.98"],
}
"""Rates slightly below 3, 1.5 and 1 bits, because the calibration is counted, too."""

TRAIN = [
    "--width",
    "256",
    "--no-gate",
    "--epochs",
    "4",
    "--batch-tokens",
    "16384",
    "--loss",
    "exact",
]

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for a two-sided 95 % interval, by degrees of freedom."""


def bits_a_value(cache: Path) -> float:
    """Return the bits a value of all files of the train embeddings."""
    size = sum(
        path.stat().st_size
        for part in ("train/embeddings", "train/scale", "codec")
        for path in (cache / part).rglob("*")
        if path.is_file()
    )
    found = embedcache("info", str(cache))
    return 8 * size / (found["splits"]["train"]["tokens"] * found["base"]["hidden_size"])


def scores(cache: Path, lossless: Path, out: Path, seeds: range, lr: str) -> list[float]:
    """Train on a cache with each seed; return the losses on the test split of ``lossless``."""
    out.mkdir(parents=True, exist_ok=True)
    sweep = out / "seeds.toml"
    sweep.write_text(f"[grid]\nseed = {list(seeds)}\n")
    flags = [*TRAIN, "--lr", lr, "--patience", "4", "--sweep", str(sweep)]
    embedcache("train", str(cache), "--out", str(out), *flags)
    found = [embedcache("eval", str(out / f"seed={seed}"), str(lossless)) for seed in seeds]
    return [float(one["rows"][0]["cross_entropy"]) for one in found]


def rise(coded: list[float], exact: list[float]) -> dict[str, Any]:
    """Return the mean paired rise in per cent and its 95 % interval over seeds."""
    rises = [100 * (a / b - 1) for a, b in zip(coded, exact, strict=True)]
    mean = statistics.fmean(rises)
    row: dict[str, Any] = {"rise_percent": round(mean, 3), "seeds": len(rises)}
    if len(rises) > 1:
        half = T_95[len(rises) - 1] * statistics.stdev(rises) / math.sqrt(len(rises))
        row["interval"] = [round(mean - half, 3), round(mean + half, 3)]
    return row


def measure(name: str, source: str, flags: list[str], lr: str, options: argparse.Namespace) -> None:
    """Measure every codec on one corpus; append each row to ``results.json``."""
    out: Path = options.out
    results = out / "results.json"
    rows = json.loads(results.read_text()) if results.is_file() else []
    exact: list[float] = []
    lossless = out / f"{name}.{LOSSLESS}.cache"
    for codec in options.codecs:
        cache = out / f"{name}.{codec.replace(', ', '-').replace(' ', '')}.cache"
        extract(source, cache, base=options.base, flags=[*flags, *CODECS[codec]])
        folder = cache.with_suffix(".carryons")
        found = scores(cache, lossless, folder, range(options.seeds), lr)
        exact = found if codec == LOSSLESS else exact
        row = {
            "corpus": name,
            "codec": codec,
            "bits_a_value": round(bits_a_value(cache), 4),
            "test": [round(value, 4) for value in found],
            **rise(found, exact),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        results.write_text(json.dumps(rows, indent=2) + "\n")


def main() -> None:
    """Measure both corpora."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--stdlib", default="stdlib:", help="folder, or stdlib: for this Python's")
    parser.add_argument("--split-file", help="JSON of file names by split")
    parser.add_argument("--gsm8k-train", type=Path)
    parser.add_argument("--gsm8k-test", type=Path)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11))
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=CODECS)
    options = parser.parse_args()
    options.codecs = list(dict.fromkeys([LOSSLESS, *options.codecs]))
    options.out.mkdir(parents=True, exist_ok=True)
    split = ["--split-file", options.split_file] if options.split_file else []
    measure("stdlib", options.stdlib, split, "2e-3", options)
    if options.gsm8k_train:
        source, flags = gsm8k_files(options.gsm8k_train, options.gsm8k_test, options.out)
        measure("gsm8k", source, flags, "4e-3", options)


if __name__ == "__main__":
    main()
