"""Teach a format with prompt/completion pairs: the loss is on the completions only.

A few hundred small sums are written as JSON lines, rendered through templates, cached, and a
carry-on is trained on the answers. Takes about two minutes on 2 cores. Run with:

    python examples/prompt_completion.py
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from embedcache.base.load import load_base
from embedcache.compose.generate import Sampling, generate
from embedcache.compose.model import compose
from embedcache.corpus.config import CorpusConfig
from embedcache.evaluation.evaluate import evaluate
from embedcache.extraction.extract import extract
from embedcache.training.config import TrainConfig
from embedcache.training.train import train
from embedcache_cli.show import TerminalProgress

BASE = "builtin:smollm2-135m"
OUT = Path("runs/pairs")


def write_pairs(path: Path, count: int = 600) -> None:
    """Write records {question, answer} whose answers follow one house style."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        item = draw.choice(["apples", "pens", "tickets", "stamps", "books"])
        each, number = draw.randint(2, 9), draw.randint(2, 9)
        question = f"{number} {item} cost {each} coins each. How much in all?"
        answer = f"[{number} x {each}] -> {number * each} coins."
        lines.append(json.dumps({"question": question, "answer": answer}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Cache, train, evaluate and answer one question with base and carry-on."""
    shutil.rmtree(OUT, ignore_errors=True)
    write_pairs(OUT / "sums.jsonl")
    corpus = CorpusConfig(
        sources=(str(OUT / "sums.jsonl"),),
        prompt="Question: {question}\nAnswer: ",
        completion="{answer}",
    )
    cache, carryon = OUT / "cache", OUT / "carryon"
    progress = TerminalProgress()
    extract(corpus, base=BASE, out=cache, progress=progress)
    train(cache, out=carryon, config=TrainConfig(epochs=6), progress=progress)
    found = evaluate(carryon, cache, progress=progress)
    row = found.rows[0]
    print(f"cross-entropy of held-out answers, nats a token: base {found.base_cross_entropy:.3f}, ")
    print(f"carry-on {row['cross_entropy']:.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
    prompt = "Question: 4 lamps cost 6 coins each. How much in all?\nAnswer: "
    base = load_base(BASE)
    with compose(base, carryon) as composed:
        for name, alpha in (("base", 0.0), ("carry-on", 1.0)):
            sampling = Sampling(max_new_tokens=24)
            print(f"{name}: {generate(composed, prompt, alpha=alpha, sampling=sampling)!r}")


if __name__ == "__main__":
    main()
