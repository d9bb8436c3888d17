"""A carry-on of 100 million parameters for a base of 32B's shape, in less than 1 GB of a GPU.

The base has the width and vocabulary of a 32B model (5,120 and 152,064), random weights and one
layer: what training takes depends on shapes alone. It is extracted and trained on by the product's
own commands, each training in a process of its own, which reports what its allocator reserved at
most, and what the driver says that it has.

That the leanest settings learn as much is shown on the real base: the same carry-on is trained with
the plain settings and with the leanest ones, which keep bfloat16 weights on the GPU, the
optimiser's states and the head in host memory, and recompute activations for the gradient.

    python examples/paper/gpu_memory.py --out runs/gpu-memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from commands import embedcache, extract

from embedcache.base.load import load_tokenizer
from embedcache.training.budget import probe
from embedcache.training.budget.allocator import configure_allocator
from embedcache.training.budget.ladder import Rung

BUDGETS = {
    "shortlist": ["--memory", "0.95GB", "--loss", "shortlist"],
    "shortlist, a tighter budget": ["--memory", "0.7GB", "--loss", "shortlist"],
    "exact loss, the head streamed": ["--memory", "0.95GB", "--loss", "exact"],
    "shortlist, no budget": ["--loss", "shortlist"],
}
TRAIN = ["--epochs", "4", "--batch-tokens", "16384", "--lr", "5e-4"]
LEAN = ["--width", "256", "--no-gate", "--epochs", "3", "--batch-tokens", "16384"]

ENVIRONMENT = dict(os.environ)
"""Of children: without what a memory budget sets for the libraries of this process."""

KEPT = ["refused", "parameters", "tokens_per_second", "data_wait", "memory"]
KEPT += ["reserved_gb", "allocated_gb", "driver_mib"]

CHILD = """
import json, subprocess, sys, threading, os
import torch
from commands import embedcache

def used():
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
        pairs = [line.split(",") for line in found]
        mine = [int(b) for a, b in pairs if int(a) == os.getpid() and b.strip().isdigit()]
        return max(mine, default=0)
    except (OSError, ValueError):
        return 0

most, done = [0], threading.Event()
def watch():
    while not done.wait(0.5):
        most[0] = max(most[0], used())
threading.Thread(target=watch, daemon=True).start()
result = embedcache("train", *sys.argv[1:])
done.set()
cuda = torch.cuda.is_available()
result["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9 if cuda else None
result["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
result["driver_mib"] = most[0] or None
print(json.dumps(result))
"""


def random_base(folder: Path, tokenizer: str, hidden: int, vocabulary: int) -> Path:
    """Save a base of one layer with random weights, bfloat16; one that is there is left."""
    if (folder / "config.json").is_file():
        return folder
    words = load_tokenizer(tokenizer)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 1024),
        vocab_size=max(vocabulary, len(words)),
        tie_word_embeddings=False,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def trained(cache: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """Train in a process of its own; return its summary and its memory, or why it was refused."""
    command = [sys.executable, "-c", CHILD, str(cache), "--out", str(out), *flags]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if "DeviceMemoryError" not in last:
            raise SystemExit(f"embedcache train {' '.join(flags)}: {done.stderr}")
        return {"refused": last.partition(": ")[2]}
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@contextmanager
def leanest() -> Iterator[None]:
    """Let budgets choose the leanest settings alone, with CUDA graphs or without."""
    ladder = probe.ladder

    def last(*given: Any, **more: Any) -> list[Rung]:
        found = ladder(*given, **more)
        return [rung for rung in found if rung.name == found[-1].name]

    probe.ladder = last
    try:
        yield
    finally:
        probe.ladder = ladder


def main() -> None:
    """Train within each budget; ``results.json`` grows row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="builtin:smollm2-135m", help="the real one")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--width", type=int, default=1728)
    parser.add_argument("--lean-memory", default="400MB")
    options = parser.parse_args()
    configure_allocator()  # for this process, too, before it computes anything
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"memory": [], "quality": []}

    def noted(part: str, row: dict[str, Any]) -> None:
        report[part].append(row)
        print(json.dumps(row), flush=True)
        (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")

    limit = ["--limit-tokens", str(options.tokens), "--max-tokens-per-document", "1024"]
    base = random_base(out / "base", options.base, options.hidden, options.vocabulary)
    cache = out / "wide.cache"
    extract(options.corpus, cache, base=str(base), flags=[*limit, "--codec", "int8"])
    for name, flags in BUDGETS.items():
        folder = out / name.replace(", ", "-").replace(" ", "_")
        found = trained(cache, folder, ["--width", str(options.width), *TRAIN, *flags])
        kept = {key: found[key] for key in KEPT if key in found}
        noted("memory", {"what": name, **kept})
    cache = out / "real.cache"
    extract(options.corpus, cache, base=options.base, flags=limit)
    for name, flags in {"plain": [], "lean": ["--memory", options.lean_memory]}.items():
        for loss in ("exact", "shortlist"):
            folder = out / f"{name}-{loss}"
            arguments = ["--out", str(folder), "--loss", loss, *LEAN, *flags]
            with leanest() if flags else nullcontext():
                found = embedcache("train", str(cache), *arguments)
            noted(
                "quality",
                {
                    "what": name,
                    "loss": loss,
                    "base_dev": found["base_dev"],
                    "dev": found["best_dev"],
                    "plan": found["memory"],
                },
            )


if __name__ == "__main__":
    main()
