"""Alternatives to the ``transform`` codec, each compared with the codec as it is.

Every idea is calibrated on the same sample to the same bits a value. Carry-ons are trained from one
lossless cache whose train embeddings are encoded and decoded by the idea, batch by batch, and
scored on the lossless test split. An idea therefore needs neither a file format nor a second cache.

    python examples/paper/codec_ideas.py CACHE --out runs/ideas --bits 1.0

Axes: N rows, or B and T of a batch; H hidden; C features that predict an embedding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.cache import cache as reader
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.integers import STATELESS
from embedcache.cache.codecs.transform import unit_rows
from embedcache.carryon.branch.config import BranchConfig
from embedcache.data.frozen import FrozenInputs
from embedcache.device import resolve_device
from embedcache.evaluation.evaluate import evaluate
from embedcache.extraction import calibrate
from embedcache.extraction.calibrate import Sample, coded_bits
from embedcache.loss import linear_cross_entropy
from embedcache.training.config import TrainConfig
from embedcache.training.train import sweep

Array = np.ndarray[Any, Any]
PLACES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Idea:
    """A way to quantise embeddings and to read them back. The defaults are the codec as it is.

    Attributes:
        known: the features that predict an embedding: "token", "token before", "state before". The
            state before is used without error. A decoder has it only with error, so this idea is
            an upper bound.
        metric: the metric of the error: "fisher", "gram" (of the head), or "plain".
        isotropic: the weight of the plain error in the metric.
        dead: the shift of the rounding threshold towards the larger magnitude, in steps.
        rebuilt: the value that a decoder gives within a step: "middle", "centroid" (the mean of the
            values in that step), "spread" (scaled to the component's variance), "noise" (random for
            zeros), or "drawn" (random for all).
        noise: the standard deviation of the noise, relative to the values that round to zero.
    """

    known: tuple[str, ...] = ("token",)
    metric: str = "fisher"
    isotropic: float = calibrate.ISOTROPIC
    dead: float = 0.0
    rebuilt: str = "middle"
    noise: float = 1.0


IDEAS = {
    "as it is": Idea(),
    "nothing predicted": Idea(known=()),
    "the token before predicts, too": Idea(known=("token", "token before")),
    "the state before predicts, too": Idea(known=("token", "state before")),
    "plain error": Idea(metric="plain"),
    "the head's Gram matrix": Idea(metric="gram"),
    "ten times the plain error": Idea(isotropic=1.0),
    "a tenth of the plain error": Idea(isotropic=0.01),
    "dead zone": Idea(dead=0.12),
    "rebuilt at centroids": Idea(rebuilt="centroid"),
    "rebuilt to the variance": Idea(rebuilt="spread"),
    "noise for zeros": Idea(rebuilt="noise"),
    "noise for zeros, half of it": Idea(rebuilt="noise", noise=0.5),
    "noise for all": Idea(rebuilt="drawn"),
    "noise for zeros, plain error": Idea(rebuilt="noise", metric="plain"),
    "noise for zeros, ten times the plain error": Idea(rebuilt="noise", isotropic=1.0),
    "noise for zeros, dead zone": Idea(rebuilt="noise", dead=0.12),
}


class Tried:
    """An idea fitted on a sample."""

    def __init__(self, idea: Idea, sample: Sample, embedding_VH: torch.Tensor, head: Head):
        self._idea, self._embedding_VH = idea, embedding_VH
        self._mean_H = sample.x_NH.mean(dim=0)
        context_NC = self._context(sample.x_NH, sample.ids_N)
        gram_CC = (context_NC.T @ context_NC).double()
        gram_CC.diagonal().add_(calibrate.RIDGE * gram_CC.diagonal().mean())
        target_NH = sample.x_NH - self._mean_H
        self._predictor_CH = target_NH.new_zeros(0, target_NH.shape[1])
        if idea.known:
            found_CH = torch.linalg.solve(gram_CC, (context_NC.T @ target_NH).double())
            self._predictor_CH = found_CH.float()
        root_HH = calibrate._root(self._metric(sample, head))
        left_NH = target_NH - context_NC @ self._predictor_CH
        variance_H, axes_HH = torch.linalg.eigh(root_HH @ torch.cov(left_NH.T.double()) @ root_HH)
        self._forward_HH = (root_HH @ axes_HH[:, variance_H.argsort(descending=True)]).float()
        self._inverse_HH = torch.linalg.inv(self._forward_HH.double()).float()
        self.step = 1.0

    def _metric(self, sample: Sample, head: Head) -> torch.Tensor:
        identity = torch.eye(sample.x_NH.shape[1], dtype=torch.float64, device=sample.x_NH.device)
        if self._idea.metric == "plain":
            return identity
        if self._idea.metric == "gram":
            gram_HH = (head.weight_VH.float().T @ head.weight_VH.float()).double()
            return gram_HH / gram_HH.diagonal().mean() + self._idea.isotropic * identity
        with patch.object(calibrate, "ISOTROPIC", self._idea.isotropic):
            return calibrate._metric(sample, head)

    def _context(self, x_NH: torch.Tensor, ids_N: Array) -> torch.Tensor:
        """Return the features [..., C] that predict each row."""
        e_NH = unit_rows(self._embedding_VH[torch.from_numpy(ids_N).to(x_NH.device)])
        e_NH = (
            e_NH
            - self._embedding_VH.float().mean(dim=0) / self._embedding_VH.float().norm(dim=1).mean()
        )
        of = {"token": e_NH, "token before": e_NH, "state before": x_NH.float() - self._mean_H}
        parts = [x_NH.new_zeros(*x_NH.shape[:-1], 0).float()]
        for name in self._idea.known:
            part = of[name]
            if name.endswith("before"):
                part = torch.cat([torch.zeros_like(part[..., :1, :]), part[..., :-1, :]], dim=-2)
            parts.append(part)
        return torch.cat(parts, dim=-1)

    def coefficients(self, x_NH: torch.Tensor, ids_N: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the coefficients and the predicted embeddings."""
        predicted_NH = self._mean_H + self._context(x_NH, ids_N) @ self._predictor_CH
        return (x_NH.float() - predicted_NH) @ self._forward_HH, predicted_NH

    def rounded(self, y_NH: torch.Tensor) -> torch.Tensor:
        """Return the coefficients rounded to whole steps."""
        scaled_NH = y_NH / self.step
        return scaled_NH.sign() * (scaled_NH.abs() + 0.5 - self._idea.dead).floor()

    def calibrated(self, fit: Sample, held: Sample, bits: float) -> float:
        """Find the step that takes ``bits`` bits a value; return the bits that it takes."""
        y_NH, _ = self.coefficients(held.x_NH, held.ids_N)
        low, high = -10.0, 10.0
        for _ in range(14):
            self.step = 2 ** ((low + high) / 2)
            coarse = coded_bits(self.rounded(y_NH), 1.0) < bits
            low, high = (low, (low + high) / 2) if coarse else ((low + high) / 2, high)
        self._learn(self.coefficients(fit.x_NH, fit.ids_N)[0])
        return coded_bits(self.rounded(y_NH), 1.0)

    def _learn(self, y_NH: torch.Tensor) -> None:
        """Measure how coefficients are distributed within their steps."""
        q_NH = self.rounded(y_NH)
        size_NH = (y_NH / self.step).abs() - q_NH.abs()
        self._shift_2H = torch.stack(
            [
                torch.where(q_NH.abs() == k, size_NH, 0.0).sum(0)
                / (q_NH.abs() == k).sum(0).clamp_min(1)
                for k in (1, 2)
            ]
        )
        power_H = q_NH.square().mean(0)
        gain_H = ((y_NH / self.step).square().mean(0) / power_H.clamp_min(1e-9)).sqrt()
        self._gain_H = torch.where(power_H > 1e-3, gain_H.clamp(0.5, 2.0), 1.0)
        zero_NH = q_NH == 0
        square_NH = torch.where(zero_NH, (y_NH / self.step).square(), 0.0)
        self._noise_H = (square_NH.sum(0) / zero_NH.sum(0).clamp_min(1)).sqrt()

    def there_and_back(self, x_NH: torch.Tensor, ids_N: Array) -> torch.Tensor:
        """Return the embeddings after encoding and decoding."""
        y_NH, predicted_NH = self.coefficients(x_NH, ids_N)
        q_NH = self.rounded(y_NH)
        if self._idea.rebuilt == "centroid":
            for k, shift_H in enumerate(self._shift_2H, start=1):
                q_NH = torch.where(q_NH.abs() == k, q_NH.sign() * (k + shift_H), q_NH)
        elif self._idea.rebuilt == "spread":
            q_NH = q_NH * self._gain_H
        elif self._idea.rebuilt in ("noise", "drawn"):
            noise_NH = torch.randn_like(q_NH) * self._noise_H * self._idea.noise
            moved_NH = q_NH
            if self._idea.rebuilt == "drawn":
                moved_NH = q_NH + torch.rand_like(q_NH) - 0.5
            q_NH = torch.where(q_NH == 0, noise_NH, moved_NH)
        return (predicted_NH + self.step * q_NH @ self._inverse_HH).to(torch.bfloat16)


class Decoder:
    """A codec that reads lossless embeddings as if an idea had stored them."""

    def __init__(self, change: Callable[[torch.Tensor, Array], torch.Tensor]):
        self._change = change

    def decode(self, stored: dict[str, torch.Tensor], ids_N: Array) -> torch.Tensor:
        """Return the embeddings, bfloat16."""
        return self._change(STATELESS["bf16"].decode(stored, ids_N), ids_N)


@contextmanager
def read_through(change: Callable[[torch.Tensor, Array], torch.Tensor]) -> Iterator[None]:
    """Read the train split as if an idea had stored it."""
    opened = reader.open_codecs

    def codecs(cache: Path, split: str, settings: Any) -> Any:
        return {"final": Decoder(change)} if split == "train" else opened(cache, split, settings)

    with patch.object(reader, "open_codecs", codecs):
        yield


def sampled(cache: Cache, device: torch.device) -> Sample:
    """Return rows from ``PLACES`` blocks of train."""
    split = cache.split("train")
    rows = []
    for number in np.unique(np.linspace(0, split.manifest.blocks - 1, PLACES).astype(int)).tolist():
        block = split.block(number, ("final",))
        for first, stop in block.rows_S2.tolist():
            after_N = np.append(block.ids_N[first + 1 : stop], -1)
            part_N = np.full(stop - first, number)
            rows.append((block.x_NH["final"][first:stop], block.ids_N[first:stop], after_N, part_N))
    x, ids, after, part = zip(*rows, strict=True)
    return Sample(torch.cat(x), *(np.concatenate(one) for one in (ids, after, part))).to(device)


def base_rise(tried: Tried, held: Sample, head: Head) -> float:
    """Return the rise of the base's cross-entropy on decoded rows, in per cent."""
    some = held.rows(held.targets_N >= 0)
    targets_N = torch.from_numpy(some.targets_N).to(some.x_NH.device)
    decoded_NH = tried.there_and_back(held.x_NH, held.ids_N)
    keep = torch.from_numpy(np.flatnonzero(held.targets_N >= 0)).to(decoded_NH.device)
    dtype = head.weight_VH.dtype
    exact = linear_cross_entropy(some.x_NH.to(dtype), head, targets_N).double().mean()
    found = linear_cross_entropy(decoded_NH[keep].to(dtype), head, targets_N).double().mean()
    return 100 * float(found / exact - 1)


def trained(cache: Path, out: Path, config: TrainConfig, seeds: int) -> list[float]:
    """Train with each seed; return the losses on test."""
    runs = {out / str(s): replace(config, seed=s, order_seed=0) for s in range(seeds)}
    for result in sweep(cache, runs=runs):
        if result.failure is not None:
            raise result.failure
    found = [evaluate(folder, cache, alphas=(1.0,)).rows for folder in runs]
    return [float(rows[-1]["cross_entropy"]) for rows in found]


def main() -> None:
    """Measure every idea; append each row to ``results.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, help="a lossless cache (bf16)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=IDEAS)
    options = parser.parse_args()
    device = resolve_device("auto")
    options.out.mkdir(parents=True, exist_ok=True)
    cache = Cache(options.cache)
    shape = BranchConfig(width=options.width, gate=False)
    config = TrainConfig(
        carryon=shape, epochs=options.epochs, batch_tokens=16_384, patience=options.epochs
    )
    inputs = FrozenInputs(cache, device, arrays=("head", "token_embedding"))
    sample = sampled(cache, device)
    held_N = sample.held_out()
    fit, held = sample.rows(~held_N), sample.rows(held_N)
    embedding = cache.base_array("token_embedding/weight")
    embedding_VH = (inputs.head.weight_VH if embedding is None else embedding).to(device)
    exact = trained(options.cache, options.out / "lossless", config, options.seeds)
    rows = [{"idea": "lossless", "test": [round(loss, 4) for loss in exact]}]
    print(json.dumps(rows[0]), flush=True)
    for name in options.ideas:
        tried = Tried(IDEAS[name], fit, embedding_VH, inputs.head)
        bits = tried.calibrated(fit, held, options.bits)

        def change(x: torch.Tensor, ids: Array, tried: Tried = tried) -> torch.Tensor:
            found = tried.there_and_back(x.to(device), ids)
            return found.to(x.device)

        with read_through(change):
            found = trained(options.cache, options.out / name, config, options.seeds)
        rises = [100 * (a / b - 1) for a, b in zip(found, exact, strict=True)]
        row = {
            "idea": name,
            "bits": round(bits, 4),
            "base_rise_percent": round(base_rise(tried, held, inputs.head), 3),
            "test": [round(loss, 4) for loss in found],
            "rise_percent": round(statistics.fmean(rises), 3),
            "spread": round(statistics.stdev(rises), 3) if len(rises) > 1 else None,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        (options.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
