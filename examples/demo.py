"""The main job, start to end: cache a base over source files, train a carry-on, see that it helps.

The base is SmolLM2-135M-Instruct, the corpus this Python's standard library, about 100,000
training tokens from many files. Everything lands in ``runs/demo``. Run with:

    make demo        or        python examples/demo.py
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from embedcache.base.load import load_base
from embedcache.carryon.saving import WEIGHTS_FILE
from embedcache.compose.generate import Sampling, generate
from embedcache.compose.model import compose
from embedcache.corpus.config import CorpusConfig
from embedcache.evaluation.evaluate import evaluate
from embedcache.extraction.extract import extract
from embedcache.training.config import TrainConfig
from embedcache.training.train import train
from embedcache.units import size
from embedcache_cli.show import TerminalProgress, print_pairs, print_table

BASE = "builtin:smollm2-135m"
OUT = Path("runs/demo")
PROMPT = 'def read_config(path):\n    """Read a configuration file and return'


def main() -> None:
    """Run every stage and print what came of it."""
    started = time.perf_counter()
    progress = TerminalProgress()
    cache, carryon = OUT / "cache", OUT / "carryon"
    shutil.rmtree(carryon, ignore_errors=True)

    print(f"1. Extracting: {BASE} over stdlib:, once (the first run converts the base, too)")
    corpus = CorpusConfig(
        sources=("stdlib:",),
        limit_documents=186,
        max_tokens_per_document=1024,
        dev_fraction=0.1,
        test_fraction=0.23,
    )
    extracted = extract(corpus, base=BASE, out=cache, progress=progress)

    print("2. Training a carry-on from the cache alone")
    trained = train(cache, out=carryon, config=TrainConfig(epochs=3), progress=progress)

    print("3. Evaluating on held-out files")
    found = evaluate(carryon, cache, progress=progress)

    row = found.rows[0]
    weights = (carryon / WEIGHTS_FILE).stat().st_size
    print()
    print_table(
        ["held-out files", "cross-entropy", "perplexity"],
        [
            ["base", f"{found.base_cross_entropy:.4f}", f"{found.base_perplexity:.3f}"],
            ["carry-on", f"{row['cross_entropy']:.4f}", f"{row['perplexity']:.3f}"],
        ],
    )
    print()
    print_pairs(
        [
            (
                "difference",
                f"{row['difference']:+.4f} nats a token, 95 % interval [{row['low']:+.4f}, "
                f"{row['high']:+.4f}] over {found.documents} files",
            ),
            ("parameters", f"{trained.parameters:,} ({size(weights)} on disk)"),
            (
                "cache",
                f"{extracted.bytes_per_token:,.0f} bytes a token, {size(extracted.bytes)} in all",
            ),
            (
                "stage one",
                f"{extracted.tokens_per_second:,.0f} tokens/s "
                f"({sum(extracted.tokens.values()):,} tokens in {extracted.seconds:.0f} s)",
            ),
            (
                "stage two",
                f"{trained.tokens_per_second:,.0f} tokens/s "
                f"({trained.tokens:,} tokens in {trained.seconds:.0f} s)",
            ),
            ("plot", carryon / "loss.png"),
            ("all stages", f"{time.perf_counter() - started:.0f} s"),
        ]
    )

    print("\n4. One prompt, answered by both")
    base = load_base(BASE)
    with compose(base, carryon) as composed:
        for name, alpha in (("base", 0.0), ("carry-on", 1.0)):
            text = generate(composed, PROMPT, alpha=alpha, sampling=Sampling(max_new_tokens=40))
            print(f"\n--- {name} ---\n{PROMPT}{text}")


if __name__ == "__main__":
    main()
