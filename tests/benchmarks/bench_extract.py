"""Extraction against the bare transformers forward over the same batches.

Both run over the same blocks of real text, in rounds by turns, so that a slow moment of the
machine falls on both; the rate is of all rounds' seconds. Ours is everything a run does: forward,
gathering, encoding, checksums, fsync, commit. The peer is ``model.get_decoder()(input_ids)`` on the
same padded batches, no logits.

    python tests/benchmarks/bench_extract.py [--tokens 32000] [--rounds 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from embedcache.base.load import Base, load_base
from embedcache.base.taps import decoder_of
from embedcache.cache.layout import ExtractSettings
from embedcache.cache.tokens import SplitTokens
from embedcache.corpus.config import CorpusConfig
from embedcache.extract import extract
from embedcache.extraction.forward import plan_batches

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row


def bare_forward(base: Base, tokens: SplitTokens, blocks: range, batch_tokens: int) -> float:
    """Return seconds of the plain forward over the blocks' batches."""
    decoder = decoder_of(base.model)
    started = time.perf_counter()
    with torch.no_grad():
        for block in blocks:
            ids_N, rows_S2, _ = tokens.read(block)
            lengths = (rows_S2[:, 1] - rows_S2[:, 0]).tolist()
            for batch in plan_batches(lengths, batch_tokens):
                ids_BT = np.zeros((len(batch), lengths[batch[0]]), np.int64)
                for b, index in enumerate(batch):
                    first, stop = rows_S2[index]
                    ids_BT[b, : stop - first] = ids_N[first:stop]
                decoder(input_ids=torch.from_numpy(ids_BT).to(base.device), use_cache=False)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    settings = ExtractSettings(batch_tokens=16384 if cuda else 2048)
    corpus = CorpusConfig(
        sources=(options.corpus,),
        limit_tokens=options.tokens,
        dev_fraction=0.0,
        test_fraction=0.0,
    )
    base = load_base(options.base)
    seconds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):  # the first round warms both up
            out = Path(folder) / str(number)
            summary = extract(corpus, base=options.base, out=out, settings=settings)
            tokens = SplitTokens(out, "train", settings.block_tokens)
            total = tokens.totals["tokens"]
            bare = bare_forward(base, tokens, range(tokens.blocks), settings.batch_tokens)
            seconds.append((total / summary.tokens_per_second, bare))
            print(f"round {number}: ours / bare {seconds[-1][1] / seconds[-1][0]:.3f}")
    ours, bare = (options.rounds * total / sum(pair[i] for pair in seconds[1:]) for i in (0, 1))
    command = "python tests/benchmarks/bench_extract.py " + " ".join(sys.argv[1:])
    name = "extract_gpu" if cuda else "extract_cpu"
    entry = row(
        "extraction, SmolLM2-135M, final tap, bf16",
        ours,
        "tokens/s",
        peer="bare transformers forward, same batches",
        peer_value=bare,
        command=command.strip(),
    )
    record(name, [entry], options.results)


if __name__ == "__main__":
    main()
