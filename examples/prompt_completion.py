"""Teach a format with prompt/completion pairs: the loss is on the completions only.

Six hundred small sums are written as JSON lines and rendered through two templates. A carry-on is
trained on the answers. Takes about two minutes on 2 cores.

    python examples/prompt_completion.py
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import embedcache as ec
from embedcache_cli.show import TerminalProgress

BASE = "builtin:smollm2-135m"
OUT = Path("runs/pairs")


def write_pairs(path: Path, count: int = 600) -> None:
    """Write records {question, answer} whose answers all have the same form."""
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
    """Extract, train and evaluate; answer one question with the base and with the carry-on."""
    shutil.rmtree(OUT, ignore_errors=True)
    write_pairs(OUT / "sums.jsonl")
    # The space belongs to the completion, as in ordinary text: tokens begin with their space.
    corpus = ec.CorpusConfig(
        sources=(str(OUT / "sums.jsonl"),),
        prompt="Question: {question}\nAnswer:",
        completion=" {answer}",
    )
    cache, carryon = OUT / "cache", OUT / "carryon"
    progress = TerminalProgress()
    ec.extract(corpus, base=BASE, out=cache, progress=progress)
    ec.train(cache, out=carryon, config=ec.TrainConfig(epochs=6), progress=progress)
    found = ec.evaluate(carryon, cache, progress=progress)
    print("cross-entropy of held-out answers, nats a token:")
    print(f"base {found.base_cross_entropy:.3f}, carry-on {found.rows[0]['cross_entropy']:.3f}")
    prompt = "Question: 4 lamps cost 6 coins each. How much in all?\nAnswer:"
    model = ec.load(carryon)
    for name, alpha in (("base", 0.0), ("carry-on", 1.0)):
        print(f"{name}: {ec.generate(model, prompt, alpha=alpha, max_new_tokens=24)!r}")


if __name__ == "__main__":
    main()
