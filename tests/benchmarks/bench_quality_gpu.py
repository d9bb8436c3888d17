"""Gain and training time of carry-ons and of LoRA on the same tokens.

Carry-ons of two widths are trained from one cache. LoRA (PEFT, r=16, all linear layers, bfloat16)
is trained on the live base with the same batch size, loss code, schedule, clipping and isolation of
sequences. Dev chooses the learning rate (of three) and the epoch. Test is reported.

    pip install peft
    python tests/benchmarks/bench_quality_gpu.py [--tokens 2000000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

from embedcache.base.load import Base, load_base
from embedcache.base.taps import decoder_of
from embedcache.cache.cache import Cache
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.nn.attention import segment_mask
from embedcache.corpus.config import CorpusConfig
from embedcache.data.batch import Batch
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.device import synchronize
from embedcache.evaluation.evaluate import evaluate
from embedcache.extraction.extract import extract
from embedcache.loss import linear_cross_entropy
from embedcache.training.config import TrainConfig
from embedcache.training.optim.adamw import learning_rate
from embedcache.training.train import train

RATES = (1e-3, 2e-3, 4e-3)
CARRY_ONS = {
    "r=64, gate": BranchConfig(width=64),
    "r=256, no gate": BranchConfig(width=256, gate=False),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One run: learning rate, cross-entropies in nats, and seconds of training."""

    rate: float
    dev: float
    test: float
    seconds: float


class Lora:
    """A base that is trained with LoRA on all linear layers."""

    def __init__(self, base: Base, cache: Cache):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        self.device, self._cache = base.device, cache
        self._model: Any = get_peft_model(
            base.model.train(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        )
        self._decoder = decoder_of(base.model)
        self._head = FrozenInputs(cache, base.device, dtype=base.dtype).head
        self.weights = [one for one in self._model.parameters() if one.requires_grad]

    def batches(self, split: str, tokens: int, epoch: int) -> Iterator[Batch]:
        """Yield the batches of a split; train is shuffled by the epoch."""
        loader = BatchLoader(
            self._cache.split(split),
            batch_tokens=tokens,
            taps=("final",),
            shuffle=split == "train",
            device=self.device,
        )
        return loader.epoch(epoch)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the loss of each target, [N]. Attention stays within a sequence."""
        hidden_BTH = self._decoder(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            attention_mask=segment_mask(batch.segments_BT)[:, None],
            use_cache=False,
        ).last_hidden_state
        return linear_cross_entropy(batch.at_predicted(hidden_BTH), self._head, batch.targets_N)

    @torch.no_grad()
    def score(self, split: str, tokens: int) -> float:
        """Return the cross-entropy of a split."""
        total, count = 0.0, 0
        for batch in self.batches(split, tokens, 0):
            total += float(self.losses(batch).double().sum())
            count += len(batch.targets_N)
        return total / count

    def epoch(self, optimizer: torch.optim.Optimizer, tokens: int, epoch: int, rate: Any) -> float:
        """Train one epoch and return its seconds. ``rate`` maps tokens seen to a learning rate."""
        synchronize(self.device)
        began, done = time.perf_counter(), 0
        for batch in self.batches("train", tokens, epoch):
            done += batch.tokens
            for group in optimizer.param_groups:
                group["lr"] = rate(done)
            self.losses(batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return time.perf_counter() - began


def lora(name: str, cache: Cache, peak: float, epochs: int, tokens: int) -> Found:
    """Train LoRA at a peak learning rate; return the epoch with the best dev loss."""
    peer = Lora(load_base(name, dtype="bfloat16"), cache)
    optimizer = torch.optim.AdamW(peer.weights, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    epoch_tokens = cache.split("train").manifest.tokens
    seconds, best = 0.0, Found(rate=peak, dev=float("inf"), test=float("inf"), seconds=0.0)
    for epoch in range(epochs):

        def rate(done: int, before: int = epoch * epoch_tokens) -> float:
            share = (before + done) / (epochs * epoch_tokens)
            return learning_rate(share, peak=peak, warmup=0.05)

        seconds += peer.epoch(optimizer, tokens, epoch, rate)
        dev = peer.score("dev", tokens)
        if dev < best.dev:
            best = Found(rate=peak, dev=dev, test=peer.score("test", tokens), seconds=seconds)
    return best


def carryon(shape: BranchConfig, path: Path, peak: float, epochs: int, tokens: int) -> Found:
    """Train a carry-on at a peak learning rate."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder) / "c"
        config = TrainConfig(carryon=shape, lr=peak, epochs=epochs, batch_tokens=tokens)
        summary = train(path, out=out, config=config)
        test = float(evaluate(out, path).rows[0]["cross_entropy"])
    assert summary.best_dev is not None
    return Found(rate=peak, dev=summary.best_dev, test=test, seconds=summary.seconds)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--corpus", default="stdlib:")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lora-epochs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    command = "python tests/benchmarks/bench_quality_gpu.py " + " ".join(sys.argv[1:])
    path = Path(tempfile.mkdtemp()) / "cache"
    corpus = CorpusConfig(sources=(options.corpus,), limit_tokens=options.tokens)
    extract(corpus, base=options.base, out=path)
    cache, tokens = Cache(path), options.batch_tokens

    def chosen(name: str, run: Any) -> Found:
        found = [run(rate) for rate in RATES]
        for one in found:
            print(name, one, flush=True)
        return min(found, key=lambda one: one.dev)

    ours = {
        name: chosen(
            name, lambda peak, shape=shape: carryon(shape, path, peak, options.epochs, tokens)
        )
        for name, shape in CARRY_ONS.items()
    }
    step = partial(lora, options.base, cache, epochs=options.lora_epochs, tokens=tokens)
    peer = chosen("LoRA", lambda peak: step(peak=peak))
    base = Lora(load_base(options.base, dtype="bfloat16"), cache).score("test", tokens)
    rows = []
    for name, one in ours.items():
        what = f"{name}, rate {one.rate:g}"
        against = f"PEFT LoRA r=16, all linear layers, rate {peer.rate:g}, of three"
        for kind, value, other, unit in (
            ("test cross-entropy", one.test, peer.test, f"nats, of the base's {base:.4f}"),
            ("gain on test", base - one.test, base - peer.test, "nats"),
            ("training", one.seconds, peer.seconds, "s"),
        ):
            given = {"peer": against, "peer_value": other, "command": command.strip()}
            rows.append(row(f"{kind}, carry-on of {what}", value, unit, **given))
    record("quality_gpu", rows, options.results)


if __name__ == "__main__":
    main()
