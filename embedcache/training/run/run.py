"""One training run: its folder, its progress, and the best weights so far."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.format.layout import CacheAttributes
from embedcache.cache.manifest.manifest import Manifest
from embedcache.carryon.protocol import CarryOn, InputStats
from embedcache.carryon.registry import build
from embedcache.carryon.saving import CarryOnRecord, save_carryon
from embedcache.errors import EmbedcacheError, NumericsError
from embedcache.progress import Progress
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE, Ranks
from embedcache.training.optim.adamw import learning_rate
from embedcache.training.run.checkpoint import (
    CHECKPOINT,
    METRICS_FILE,
    Checkpoint,
    Metrics,
    Tensors,
    TrainState,
    is_partial,
    load_checkpoint,
    save_checkpoint,
)
from embedcache.training.run.report import TrainSummary, publish_report
from embedcache.training.scoring import DevLoss
from embedcache.training.step.stack import Stack

CHECKPOINT_SECONDS = 60.0
"""Seconds between checkpoints."""
LOG_STEPS = 10
"""Steps between rows of the metrics."""


class Run:
    """One carry-on in training. Its current weights are a row of a `Stack`.

    Attributes:
        out: the folder.
        config: the configuration.
        loss: ``exact`` or ``shortlist``.
        state: the progress.
        total: tokens of all epochs.
        shared: whether several processes train this carry-on.
        memory: the plan for the memory budget, in words.
        failure: the error that ended the run.
        summary: the outcome of the finished run.
    """

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        *,
        loss: str,
        tokens: int,
        request: dict[str, Any],
        progress: Progress,
        ranks: Ranks = ALONE,
    ):
        """Make a run of ``tokens`` per epoch. Only the first of several processes writes files."""
        self.out, self.config, self.loss = out, config, loss
        self.state = TrainState()
        self.failure: EmbedcacheError | OSError | None = None
        self.summary: TrainSummary | None = None
        self.total = tokens * config.epochs
        self.memory: str | None = None
        self._request = request
        self.shared = ranks.count > 1
        self._writes = ranks.leads
        self._progress = progress
        self._moments: Tensors = {}
        self._best: Tensors = {}
        self.resumed_at: int | None = None
        self._begun_at = self._saved_step = 0
        self._before = (0, 0.0)
        self._saved_at = time.perf_counter()

    def begin(self, hidden: int, input_stats: dict[str, InputStats]) -> CarryOn:
        """Return the carry-on with its initial weights, or with those of the checkpoint."""
        # Initial weights depend on the seed alone, not on what was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = build(self.config.carryon, hidden)
        model.calibrate(input_stats)
        for path in self.out.iterdir():
            if self._writes and is_partial(path):
                path.unlink()
        self.state = TrainState()
        checkpoint = self.out / CHECKPOINT
        resumed = checkpoint.is_file()
        if resumed:
            found = load_checkpoint(checkpoint, model)
            self.state, self._best, self._moments = found.state, found.best, found.moments
            self._progress.say(f"resuming at step {self.state.step}")
        self._begun_at = self._saved_step = self.state.step
        if self.resumed_at is None:
            self.resumed_at = self.state.step
        self._before = (self.state.tokens, self.state.seconds)
        if self._writes:
            self.metrics = Metrics(self.out / METRICS_FILE, resume=self.state if resumed else None)
        return model

    def take_base(self, base_dev: float | None) -> None:
        """Record the base's dev loss, unless the checkpoint holds it."""
        if base_dev is not None and self.state.base_dev is None:
            self.state.base_dev = base_dev
            self._log(step=0, epoch=0, dev_loss=base_dev)

    def _log(self, **row: Any) -> None:
        if self._writes:
            self.metrics.add(**row)

    def enter(self, stack: Stack, index: int) -> None:
        """Restore the checkpoint's moments in the stack's optimiser."""
        stack.optimizer.restore(index, self._moments)
        self._moments = {}

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or ``patience`` epochs brought no better dev loss."""
        state = self.state
        stopped = state.epoch - state.best_epoch >= self.config.patience
        return state.epoch >= self.config.epochs or stopped

    def rate(self, tokens: int) -> float:
        """Return the learning rate of the next step, which has ``tokens`` tokens."""
        done = (self.state.tokens + tokens) / self.total
        return learning_rate(done, peak=self.config.lr, warmup=self.config.warmup)

    def require_finite(self, loss: float, norm: float) -> None:
        """Raise ``NumericsError`` unless a step's loss and gradient norm are finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"training stopped at step {self.state.step}: the loss is {loss} and the "
                f"gradient's norm {norm}, expected finite numbers. The state before this step is "
                f"kept in {self.out / CHECKPOINT}. Pass another `out=` and a lower `lr=` "
                f"(it was {self.config.lr:g})."
            )

    def count(
        self,
        *,
        loss: float,
        norm: float,
        rate: float,
        tokens: int,
        targets: int,
        batches: int,
        seconds: float,
        waited: float,
    ) -> None:
        """Record a step over ``batches`` batches, one for each process."""
        state = self.state
        state.position += batches
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        state.waited += waited
        state.epoch_loss += loss * targets
        state.epoch_targets += targets
        if state.step % LOG_STEPS == 0:
            self._log(
                step=state.step,
                epoch=state.epoch,
                tokens=state.tokens,
                loss=loss,
                lr=rate,
                gradient_norm=norm,
            )

    @property
    def train_loss(self) -> float:
        """The mean training loss of the current epoch."""
        return self.state.epoch_loss / max(1, self.state.epoch_targets)

    def end_epoch(self, score: DevLoss | None, weights: Tensors) -> None:
        """Keep the weights if their dev loss is the lowest so far, and begin the next epoch."""
        state = self.state
        dev, estimate = score or (None, None)
        tokens, seconds = self._before
        self._before = (state.tokens, state.seconds)
        if dev is not None and not math.isfinite(dev):
            raise NumericsError(
                f"training stopped after epoch {state.epoch + 1}: the dev loss is {dev}, expected "
                f"a finite number. Pass another `out=` and a lower `lr=` (it was "
                f"{self.config.lr:g})."
            )
        row: dict[str, float | None] = {
            "train_loss": self.train_loss,
            "tokens_per_second": (state.tokens - tokens) / max(state.seconds - seconds, 1e-9),
            "dev_loss": dev,
        }
        if estimate is not None:
            row["dev_shortlist"] = estimate
        if dev is None or state.best_dev is None or dev < state.best_dev:
            state.best_dev, state.best_epoch = dev, state.epoch + 1
            state.best_estimate = estimate
            self._best = {name: value.to("cpu", copy=True) for name, value in weights.items()}
        state.epoch += 1
        state.position, state.epoch_loss, state.epoch_targets = 0, 0.0, 0
        self._log(step=state.step, epoch=state.epoch, **row)

    @property
    def advanced(self) -> bool:
        """Whether a checkpoint was saved at a later step than the run began with."""
        return self._saved_step > self._begun_at

    @property
    def save_due(self) -> bool:
        """Whether the last checkpoint is older than `CHECKPOINT_SECONDS`."""
        return self._writes and time.perf_counter() - self._saved_at > CHECKPOINT_SECONDS

    def save(self, stack: Stack, index: int) -> None:
        """Write a checkpoint of the state, the weights and the optimiser's moments."""
        if not self._writes:
            return
        checkpoint = Checkpoint(
            state=self.state,
            weights=stack.model.member(index),
            best=self._best,
            moments=stack.optimizer.moments(index),
        )
        save_checkpoint(self.out / CHECKPOINT, checkpoint, request=self._request)
        self._saved_step = self.state.step
        self._saved_at = time.perf_counter()

    def finish(self, attributes: CacheAttributes, manifest: Manifest) -> None:
        """Write the carry-on and its report, and remove the checkpoint."""
        state = self.state
        model = build(self.config.carryon, attributes.base["hidden_size"])
        model.load_state_dict(self._best)
        summary = TrainSummary(
            out=str(self.out),
            parameters=model.parameter_count(),
            steps=state.step,
            tokens=state.tokens,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            loss=self.loss,
            base_dev=state.base_dev,
            best_dev=state.best_dev,
            shortlist_bias=None
            if state.best_estimate is None or state.best_dev is None
            else state.best_estimate - state.best_dev,
            seconds=round(state.seconds, 3),
            tokens_per_second=round(state.tokens / max(state.seconds, 1e-9), 1),
            data_wait=round(state.waited / max(state.seconds, 1e-9), 4),
            resumed_at_step=self.resumed_at or 0,
            memory=self.memory,
        )
        if self._writes:
            self._publish(model, summary, attributes, manifest)
        self.summary = summary

    def _publish(
        self, model: CarryOn, summary: TrainSummary, attributes: CacheAttributes, manifest: Manifest
    ) -> None:
        record = CarryOnRecord(
            config=self.config.carryon,
            base=attributes.base,
            training=self.config.to_dict(),
            cache={
                "manifest": manifest.hash,
                "codec": attributes.settings.codec,
                "corpus": attributes.corpus,
                "tokens": {name: split.tokens for name, split in manifest.splits.items()},
            },
            results=asdict(summary),
        )
        publish_report(self.out, self.metrics.rows(), record)
        save_carryon(self.out, model, record)
        (self.out / CHECKPOINT).unlink()
