"""Extraction against the bare forward pass of transformers over the same batches.

Both run over the same blocks of real text in several rounds. They take turns at going first, so
that a slow moment of the machine affects both. The rates are those of all rounds together.
Extraction includes everything except loading the base: forward pass, encoding, checksums, fsync,
commit, and the self-check. The peer is ``model.get_decoder()(input_ids)`` on the same padded
batches, without logits.

    python tests/benchmarks/bench_extract.py [--tokens 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from embedcache.base.forward import plan_batches
from embedcache.base.load import Base, load_base
from embedcache.base.taps import decoder_of
from embedcache.cache.format.layout import ExtractSettings
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.corpus.config import CorpusConfig
from embedcache.device import fast_dtype, resolve_device
from embedcache.extraction.extract import extract

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row


def bare_forward(base: Base, tokens: SplitTokens, blocks: range, batch_tokens: int) -> float:
    """Return the seconds of the bare forward pass over the batches of some blocks."""
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
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
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
    dtype = str(fast_dtype(resolve_device("auto"))).removeprefix("torch.")
    base = load_base(options.base, dtype=dtype)  # as extraction does
    with tempfile.TemporaryDirectory() as folder:

        def ours(name: str) -> float:
            out = Path(folder) / name
            summary = extract(corpus, base=options.base, out=out, settings=settings)
            return sum(summary.tokens.values()) / summary.tokens_per_second

        ours("warm")
        tokens = SplitTokens(Path(folder) / "warm", "train", settings.block_tokens)

        def bare() -> float:
            return bare_forward(base, tokens, range(tokens.blocks), settings.batch_tokens)

        bare()
        pairs = []
        for number in range(options.rounds):
            if number % 2:
                peer = bare()
                pairs.append((ours(str(number)), peer))
            else:
                mine = ours(str(number))
                pairs.append((mine, bare()))
            print(f"round {number}: ours / bare {pairs[-1][1] / pairs[-1][0]:.3f}", flush=True)
    ratios = sorted(peer / mine for mine, peer in pairs)
    print(f"median of rounds {ratios[len(ratios) // 2]:.3f}")
    work = options.rounds * tokens.totals["tokens"]
    rates = [work / sum(pair[i] for pair in pairs) for i in (0, 1)]
    command = "python tests/benchmarks/bench_extract.py " + " ".join(sys.argv[1:])
    name = "extract_gpu" if cuda else "extract_cpu"
    entry = row(
        "extraction, SmolLM2-135M, final tap, bf16",
        rates[0],
        "tokens/s",
        peer="bare forward pass of transformers, same batches",
        peer_value=rates[1],
        command=command.strip(),
    )
    record(name, [entry], options.results)


if __name__ == "__main__":
    main()
