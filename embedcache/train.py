"""Stage two: train a carry-on from a cache. The base is never opened."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.loader import Batch, BatchLoader
from embedcache.cache.reader import Cache
from embedcache.cache.sample import sample_embeddings
from embedcache.carryon.model import CarryOn
from embedcache.carryon.store import CarryOnRecord, save_carryon
from embedcache.device import any_shape_attention, resolve_device
from embedcache.disk import writing
from embedcache.errors import NumericsError, UsageError
from embedcache.evaluate import EVAL_TOKENS, FrozenInputs, score
from embedcache.files import LOCK, writer_lock
from embedcache.loss import Shortlist, cross_entropy
from embedcache.progress import SILENT, Bar, Progress
from embedcache.training.checkpoint import (
    CHECKPOINT,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from embedcache.training.config import TrainConfig
from embedcache.training.likely import LikelyTokens
from embedcache.training.metrics import METRICS_FILE, Metrics
from embedcache.training.output import check_out, is_partial
from embedcache.training.report import publish_report
from embedcache.training.schedule import learning_rate

CHECKPOINT_SECONDS = 60.0
LOG_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What a run did. Cross-entropies are in nats a token; the speed excludes evaluation."""

    out: str
    parameters: int
    steps: int
    tokens: int
    epochs: int
    best_epoch: int
    loss: str
    base_dev: float | None
    best_dev: float | None
    seconds: float
    tokens_per_second: float
    resumed_at_step: int


def train(
    cache_path: Path,
    *,
    out: Path,
    config: TrainConfig | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> TrainSummary:
    """Train a carry-on on a cache's train split into the folder ``out``.

    The dev split picks the epoch that is kept. A run that was interrupted goes on where its last
    checkpoint stands and gives the same weights as one that was not (same device and threads).

    Raises:
        UsageError: for settings that cannot be.
        CacheError: if the cache is incomplete, damaged or lacks a tap.
        OutputError: if ``out`` holds something else, or a finished carry-on.
        NumericsError: if the loss or gradient is not finite; the last good state is kept.
    """
    config = config or TrainConfig()
    cache, target, request = _checked(cache_path, out, config, device)
    training = _Training(cache, out, config, target, request, progress)
    with writing(out), writer_lock(out):
        check_out(out, request)  # what it holds may have changed on the way to the lock
        summary = training.run()
        (out / LOCK).unlink()
    return summary


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What a run would do."""

    out: str
    parameters: int
    train_tokens: int
    dev_tokens: int
    tokens_per_step: int
    steps: int
    loss: str
    device: str


def preview(cache_path: Path, *, out: Path, config: TrainConfig, device: str = "auto") -> TrainPlan:
    """Make every check that `train` makes before it writes; return the plan."""
    cache, target, _ = _checked(cache_path, out, config, device)
    tokens = cache.split("train").manifest.tokens
    step = config.steps_tokens(tokens)
    return TrainPlan(
        out=str(out),
        parameters=CarryOn(config.carryon, cache.attributes.base["hidden_size"]).parameter_count(),
        train_tokens=tokens,
        dev_tokens=cache.split("dev").manifest.tokens if cache.has("dev") else 0,
        tokens_per_step=step,
        steps=config.epochs * -(-tokens // step),
        loss=_loss_name(config, target),
        device=str(target),
    )


def _checked(
    cache_path: Path, out: Path, config: TrainConfig, device: str
) -> tuple[Cache, torch.device, dict[str, Any]]:
    cache = Cache(cache_path)
    cache.require_taps(config.carryon.taps)
    target = resolve_device(device)
    request = {"cache": cache.manifest.hash, "config": config.to_dict(), "device": target.type}
    check_out(out, request)
    return cache, target, request


class _Training:
    """One run of the training loop."""

    def __init__(
        self,
        cache: Cache,
        out: Path,
        config: TrainConfig,
        device: torch.device,
        request: dict[str, Any],
        progress: Progress,
    ):
        self._cache, self._out, self._config = cache, out, config
        self._device, self._request, self._progress = device, request, progress
        taps = config.carryon.taps
        split = cache.split("train")
        self._tokens = split.manifest.tokens
        self._inputs = FrozenInputs(cache, device, tokens=config.carryon.token_input)
        # Initial weights are drawn on the CPU from the seed alone, whatever else has drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = CarryOn(config.carryon, cache.attributes.base["hidden_size"])
        self.model.calibrate(sample_embeddings(split, taps))
        self.model.to(device)
        self._optimizer = _adamw(self.model, config)
        self._loader = BatchLoader(
            split,
            batch_tokens=config.steps_tokens(self._tokens),
            taps=taps,
            seed=config.seed,
            device=device,
        )
        self._dev = cache.split("dev") if cache.has("dev") else None
        self._loss = _loss_name(config, device)
        self._shortlist = Shortlist(self._inputs.head, samples=config.samples, seed=config.seed)
        self._likely: LikelyTokens | None = None
        self._state = TrainState()
        self._best: dict[str, torch.Tensor] = {}
        self._saved_at = time.perf_counter()

    def run(self) -> TrainSummary:
        """Train, publish the carry-on and its report, and remove the checkpoint."""
        config = self._config
        for path in self._out.iterdir():
            if is_partial(path):
                path.unlink()
        checkpoint = self._out / CHECKPOINT
        resumed = checkpoint.is_file()
        if resumed:
            self._state, self._best = load_checkpoint(checkpoint, self.model, self._optimizer)
            self._progress.say(f"resuming at step {self._state.step}")
        resumed_at = self._state.step
        metrics = Metrics(self._out / METRICS_FILE, resume=self._state if resumed else None)
        if self._dev is None:
            self._progress.say("this cache has no dev split: the last epoch will be kept")
        elif self._state.base_dev is None:
            self._state.base_dev = self._score_dev(0.0)
            metrics.add(step=0, epoch=0, dev_loss=self._state.base_dev)
        if self._loss == "shortlist":
            plain = BatchLoader(
                self._cache.split("train"),
                batch_tokens=EVAL_TOKENS,
                taps=("final",),
                shuffle=False,
                device=self._device,
            )
            self._likely = LikelyTokens(
                plain,
                self._inputs.head,
                min(config.likely, self._inputs.head.weight_VH.shape[0]),
                self._tokens,
                self._progress,
            )
        total = self._tokens * config.epochs
        with self._progress.bar("training", total, "tok") as bar:
            bar.advance(self._state.tokens)
            while self._state.epoch < config.epochs and not self._stopped_early():
                self._epoch(bar, metrics, total)
        return self._finish(metrics, resumed_at)

    def _stopped_early(self) -> bool:
        return self._state.epoch - self._state.best_epoch >= self._config.patience

    def _epoch(self, bar: Bar, metrics: Metrics, total: int) -> None:
        state = self._state
        started, tokens_before, seconds_before = time.perf_counter(), state.tokens, state.seconds
        for batch in self._loader.epoch(state.epoch, skip=state.position):
            rate = learning_rate(
                (state.tokens + batch.tokens) / total,
                peak=self._config.lr,
                warmup=self._config.warmup,
            )
            loss, norm = self._step(batch, rate)
            targets = len(batch.targets_N)
            state.position += 1
            state.step += 1
            state.tokens += batch.tokens
            state.epoch_loss += loss * targets
            state.epoch_targets += targets
            bar.advance(batch.tokens, f"loss {state.epoch_loss / max(1, state.epoch_targets):.4f}")
            if state.step % LOG_STEPS == 0:
                metrics.add(
                    step=state.step,
                    epoch=state.epoch,
                    tokens=state.tokens,
                    loss=loss,
                    lr=rate,
                    gradient_norm=norm,
                )
            if time.perf_counter() - self._saved_at > CHECKPOINT_SECONDS:
                state.seconds += time.perf_counter() - started
                self._save()
                started = time.perf_counter()
        state.seconds += time.perf_counter() - started
        metrics.add(
            step=state.step,
            epoch=state.epoch + 1,
            train_loss=state.epoch_loss / max(1, state.epoch_targets),
            tokens_per_second=(state.tokens - tokens_before)
            / max(state.seconds - seconds_before, 1e-9),
            dev_loss=self._end_epoch(),
        )
        self._save()

    def _end_epoch(self) -> float | None:
        """Score dev, keep the weights if they are the best, and move on to the next epoch."""
        state = self._state
        dev = None if self._dev is None else self._score_dev(1.0)
        if dev is not None and not math.isfinite(dev):
            raise NumericsError(
                f"training stopped after epoch {state.epoch + 1}: the dev loss is {dev}, expected "
                f"a finite number. Train into another --out with a lower --lr (it was "
                f"{self._config.lr:g})."
            )
        if dev is None or state.best_dev is None or dev < state.best_dev:
            state.best_dev, state.best_epoch = dev, state.epoch + 1
            self._best = {name: value.clone() for name, value in self.model.state_dict().items()}
        state.epoch += 1
        state.position, state.epoch_loss, state.epoch_targets = 0, 0.0, 0
        return dev

    @any_shape_attention()
    def _step(self, batch: Batch, rate: float) -> tuple[float, float]:
        targets_N = batch.targets_N
        if not len(targets_N):
            return 0.0, 0.0
        inputs = self._inputs
        x_NH = batch.at_wanted(batch.x_BTH["final"]).to(inputs.dtype)
        y_NH = x_NH + batch.at_wanted(inputs.delta(self.model, batch)).to(inputs.dtype)
        if self._likely is not None:
            likely_NK = self._likely.of(batch).to(self._device)
            loss_N = self._shortlist.cross_entropy(
                y_NH, targets_N, likely_NK, step=self._state.step
            )
        else:
            loss_N = cross_entropy(y_NH, inputs.head, targets_N)
        loss = loss_N.mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip)
        value, size = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            self._save()
            raise NumericsError(
                f"training stopped at step {self._state.step}: the loss is {value} and the "
                f"gradient's norm {size}, expected finite numbers. The state before this step is "
                f"kept in {self._out / CHECKPOINT}. Train into another --out with a lower --lr "
                f"(it was {self._config.lr:g})."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return value, size

    def _score_dev(self, alpha: float) -> float:
        if self._dev is None:
            raise UsageError("there is no dev split to score")
        loader = BatchLoader(
            self._dev,
            batch_tokens=EVAL_TOKENS,
            taps=self._config.carryon.taps,
            shuffle=False,
            device=self._device,
        )
        title = "scoring the base on dev" if alpha == 0 else "scoring dev"
        with self._progress.bar(title, self._dev.manifest.tokens, "tok") as bar:
            scores = score(
                loader.epoch(0),
                self._inputs,
                self.model,
                (alpha,),
                self._dev.manifest.documents,
                bar.advance,
            )
        return scores.mean(alpha)

    def _save(self) -> None:
        save_checkpoint(
            self._out / CHECKPOINT,
            self._state,
            self.model,
            self._best,
            self._optimizer,
            request=self._request,
        )
        self._saved_at = time.perf_counter()

    def _finish(self, metrics: Metrics, resumed_at: int) -> TrainSummary:
        state = self._state
        self.model.load_state_dict(self._best)
        summary = TrainSummary(
            out=str(self._out),
            parameters=self.model.parameter_count(),
            steps=state.step,
            tokens=state.tokens,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            loss=self._loss,
            base_dev=state.base_dev,
            best_dev=state.best_dev,
            seconds=round(state.seconds, 3),
            tokens_per_second=round(state.tokens / max(state.seconds, 1e-9), 1),
            resumed_at_step=resumed_at,
        )
        attributes = self._cache.attributes
        record = CarryOnRecord(
            config=self._config.carryon,
            base=attributes.base,
            training=self._config.to_dict(),
            cache={
                "manifest": self._cache.manifest.hash,
                "codec": attributes.settings.codec,
                "corpus": attributes.corpus,
                "tokens": {n: s.tokens for n, s in self._cache.manifest.splits.items()},
            },
            results=asdict(summary),
        )
        publish_report(self._out, metrics.rows(), record)
        save_carryon(self._out, self.model, record)
        (self._out / CHECKPOINT).unlink()
        return summary


def _adamw(model: CarryOn, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def _loss_name(config: TrainConfig, device: torch.device) -> str:
    if config.loss != "auto":
        return config.loss
    return "shortlist" if device.type == "cpu" else "exact"
