"""The whole path on real data: extract, train, evaluate, generate.

The base is SmolLM2-135M-Instruct. The corpus is made of functions of Python's standard library: the
prompt is a function's signature, the completion is the first line of its docstring. The carry-on
learns to document a function as the standard library does. Everything is written to ``runs/demo``.

    make demo        or        python examples/demo.py
"""

from __future__ import annotations

import ast
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import embedcache as ec
from embedcache.corpus.sources.folders import library_files
from embedcache.units import format_bytes
from embedcache_cli.show import TerminalProgress

BASE = "builtin:smollm2-135m"
OUT = Path("runs/demo")
PAIRS = 3600
PROMPT = '{signature}\n    """'
ASKED = (
    "def read_config(path):",
    "def parse_date(text, default=None):",
    "def send_email(address, subject, body):",
)
"""Functions that are not in the standard library."""


def documented_functions(path: Path) -> Iterator[dict[str, str]]:
    """Yield the signature and the docstring's first line of each documented function of a file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            line = docstring.splitlines()[0]
            if line.endswith(".") and len(line) <= 100 and len(signature) <= 100:
                yield {"signature": signature, "line": line}


def write_pairs(folder: Path) -> dict[str, str]:
    """Write ``PAIRS`` records in three files, split by module; return their paths by split."""
    records: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for number, (path, _) in enumerate(library_files()):
        split = ("test", "test", "dev")[number % 10] if number % 10 < 3 else "train"
        records[split] += [json.dumps(record) for record in documented_functions(path)]
        if sum(map(len, records.values())) >= PAIRS:
            break
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in records}
    for split, file in files.items():
        file.write_text("\n".join(records[split]) + "\n", encoding="utf-8")
    return {split: str(file) for split, file in files.items()}


def main() -> None:
    """Run every stage and print the results."""
    started = time.perf_counter()
    progress = TerminalProgress()
    cache, carryon = OUT / "cache", OUT / "carryon"
    shutil.rmtree(carryon, ignore_errors=True)
    files = write_pairs(OUT / "pairs")

    print(f"1. Extracting embeddings with {BASE} (the first run converts the base, too)")
    corpus = ec.CorpusConfig(
        sources=(files["train"],),
        dev_sources=(files["dev"],),
        test_sources=(files["test"],),
        prompt=PROMPT,
        completion='{line}"""',
        min_tokens=8,
    )
    extracted = ec.extract(corpus, base=BASE, out=cache, progress=progress)

    print("2. Training a carry-on from the cache alone")
    trained = ec.train(cache, out=carryon, config=ec.TrainConfig(epochs=4), progress=progress)

    print("3. Evaluating on the docstrings of held-out modules")
    found = ec.evaluate(carryon, cache, progress=progress)
    row = found.rows[0]
    print(f"""
cross-entropy  base {found.base_cross_entropy:.3f}, carry-on {row["cross_entropy"]:.3f} nats a token
perplexity     base {found.base_perplexity:.1f}, carry-on {row["perplexity"]:.1f}
difference     {row["difference"]:+.3f}, 95 % interval [{row["low"]:+.3f}, {row["high"]:+.3f}]
parameters     {trained.parameters:,}
cache          {format_bytes(extracted.bytes)}, {extracted.bytes_per_token:,.0f} bytes a token
stage one      {sum(extracted.tokens.values()):,} tokens in {extracted.seconds:.0f} s
stage two      {trained.tokens:,} tokens in {trained.seconds:.0f} s
plot           {carryon / "loss.png"}
all stages     {time.perf_counter() - started:.0f} s""")

    print("\n4. Generating docstrings")
    model = ec.load(carryon)
    for signature in ASKED:
        prompt = PROMPT.format(signature=signature)
        for name, alpha in (("base", 0.0), ("carry-on", 1.0)):
            text = ec.generate(model, prompt, alpha=alpha, max_new_tokens=48)
            print(f"\n--- {name} ---\n{prompt}{text}")


if __name__ == "__main__":
    main()
