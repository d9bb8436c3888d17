"""Training a carry-on from a cache, against LoRA on the live base and against the exact loss.

The corpus is the standard library. The carry-on is trained from the cache. LoRA (PEFT, r=16, all
linear layers) is trained on the base with the same loss code; on a CPU it runs in float32 and in
bfloat16, and the faster one counts. Both speeds include the optimiser and exclude evaluation. The
totals for 1 to 1,000 carry-ons include one extraction.

    pip install peft
    python tests/benchmarks/bench_train.py [--tokens 60000] [--batch-tokens 4096]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from embedcache.base.load import load_base
from embedcache.base.taps import decoder_of
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import ExtractSettings
from embedcache.corpus.config import CorpusConfig
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.extraction.extract import extract
from embedcache.loss import linear_cross_entropy
from embedcache.training.config import TrainConfig
from embedcache.training.train import TrainSummary, train

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

LORA_TOKENS = 1024
CARRY_ONS = (1, 10, 100, 1000)
TOP_IDS = 8
RUNS = 5
"""Number of trainings of each kind. The median is reported."""


def lora_tokens_per_second(
    name: str,
    cache: Cache,
    steps: int,
    dtype: str,
    *,
    batch_tokens: int = LORA_TOKENS,
    compiled: bool = False,
) -> float:
    """Return the speed of LoRA on the base over the cache's train batches, after a warm-up."""
    from peft import LoraConfig, get_peft_model

    base = load_base(name, dtype=dtype)
    model: Any = get_peft_model(
        base.model.train(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    head = FrozenInputs(cache, base.device, dtype=base.dtype).head
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    loader = BatchLoader(
        cache.split("train"), batch_tokens=batch_tokens, taps=("final",), device=base.device
    )
    decoder = decoder_of(base.model)
    if compiled:
        decoder = torch.compile(decoder, dynamic=True)
    warm = 4 if compiled else 1
    tokens, started = 0, 0.0
    for step, batch in enumerate(loader.epoch(0)):
        if step == warm:
            if base.device.type == "cuda":
                torch.cuda.synchronize()
            tokens, started = 0, time.perf_counter()
        if step == warm + steps:
            break
        # Rows may hold several sequences. Attention crosses them here, which costs no more time.
        hidden = decoder(
            input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False
        ).last_hidden_state
        linear_cross_entropy(batch.at_predicted(hidden), head, batch.targets_N).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.tokens
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--lora-steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    command = "python tests/benchmarks/bench_train.py " + " ".join(sys.argv[1:])
    corpus = CorpusConfig(
        sources=("stdlib:",), limit_tokens=options.tokens, max_tokens_per_document=1024
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[int, float] = {}
        every: dict[tuple[int, str], list[TrainSummary]] = {}

        def trained(top_ids: int, loss: str) -> None:
            config = TrainConfig(
                epochs=options.epochs, loss=loss, batch_tokens=options.batch_tokens
            )
            runs = every.setdefault((top_ids, loss), [])
            out = Path(folder) / f"{loss}-{top_ids}-{len(runs)}"
            found = train(Path(folder) / str(top_ids), out=out, config=config)
            runs.append(found)
            told = f"{found.tokens_per_second:,.0f} tokens/s, dev {found.best_dev}"
            print(f"{loss}, cache with {top_ids} top ids a position: {told}", flush=True)

        for top_ids in (0, TOP_IDS):
            path = Path(folder) / str(top_ids)
            settings = ExtractSettings(top_ids=top_ids)
            extracted = extract(corpus, base=options.base, out=path, settings=settings)
            seconds[top_ids] = extracted.seconds
            print(f"extraction with {top_ids}: {extracted.tokens_per_second:,.0f} tokens/s")
        # Kinds take turns, because the load of the machine changes from minute to minute.
        for _ in range(RUNS):
            for top_ids, loss in ((TOP_IDS, "shortlist"), (0, "exact"), (0, "shortlist")):
                trained(top_ids, loss)

        def median_of(top_ids: int, loss: str) -> TrainSummary:
            return sorted(every[top_ids, loss], key=lambda one: one.tokens_per_second)[RUNS // 2]

        ours = {top_ids: median_of(top_ids, "shortlist") for top_ids in seconds}
        exact = median_of(0, "exact")
        cache = Cache(path)
        train_tokens = cache.split("train").manifest.tokens
        dtypes = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
        loras = {
            dtype: lora_tokens_per_second(options.base, cache, options.lora_steps, dtype)
            for dtype in dtypes
        }
        print({dtype: f"{rate:,.0f} tokens/s" for dtype, rate in loras.items()})
    steps = "" if options.batch_tokens is None else f", steps of {options.batch_tokens:,} tokens"
    lora = max(loras.values())
    lora_peer = {"peer": "PEFT LoRA r=16, all linear layers, on the base", "peer_value": lora}
    exact_peer, told = "the same with the exact loss", {"command": command.strip()}
    rows = []
    for top_ids, one in ours.items():
        beside = (", cache with top ids" if top_ids else "") + steps
        name, rate = f"training one carry-on, r=64, shortlist{beside}", one.tokens_per_second
        rows += [
            row(name, rate, "tokens/s", **lora_peer, **told),
            row(
                name,
                rate,
                "tokens/s",
                peer=exact_peer,
                peer_value=exact.tokens_per_second,
                **told,
            ),
            row(
                f"dev cross-entropy of one carry-on, r=64, shortlist{beside}",
                one.best_dev,
                "nats",
                peer=exact_peer,
                peer_value=exact.best_dev,
                **told,
            ),
        ]
    peer = seconds[0]
    rows.append(
        row(
            "extraction with top ids (8)",
            seconds[TOP_IDS],
            "s",
            peer="extraction without top ids",
            peer_value=peer,
            **told,
        )
    )
    for count in CARRY_ONS:
        tokens = count * options.epochs * train_tokens
        taken = {k: seconds[k] + tokens / one.tokens_per_second for k, one in ours.items()}
        best = min(taken, key=taken.__getitem__)
        name = (
            f"{count:,} carry-on{'s' * (count > 1)} of {options.epochs} epochs, extraction included"
        )
        name += (", with top ids" if best else "") + steps
        lora_peer["peer_value"] = tokens / lora
        rows.append(row(name, taken[best], "s, by these speeds", **lora_peer, **told))
    record("train_gpu" if torch.cuda.is_available() else "train_cpu", rows, options.results)


if __name__ == "__main__":
    main()
