"""Stage two: train carry-ons from a cache. The base is never opened."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.reader import Cache
from embedcache.carryon.model import CarryOn
from embedcache.carryon.store import CONFIG_FILE, read_record
from embedcache.device import resolve_device
from embedcache.disk import writing
from embedcache.errors import EmbedcacheError
from embedcache.files import LOCK, writer_lock
from embedcache.progress import SILENT, Progress
from embedcache.training.config import TrainConfig
from embedcache.training.member import Member, TrainSummary
from embedcache.training.output import check_out
from embedcache.training.ranks import ALONE, Ranks, joined, local_device
from embedcache.training.trainer import Trainer

__all__ = ["SweepResult", "TrainPlan", "TrainSummary", "preview", "sweep", "train"]


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

    Under ``torchrun``, every process takes a share of each step's tokens (data-parallel).

    Raises:
        UsageError: for settings that cannot be.
        CacheError: if the cache is incomplete, damaged or lacks a tap.
        OutputError: if ``out`` holds something else, or a finished carry-on.
        NumericsError: if the loss or gradient is not finite; the last good state is kept.
    """
    runs = {out: config or TrainConfig()}
    target = local_device(resolve_device(device))
    with joined(target) as ranks:
        shared = _Shared(cache_path, target, progress, ranks)
        for out, settings in runs.items():
            shared.check(out, settings)
        (result,) = _train(shared, runs)
    if result.failure is not None:
        raise result.failure
    assert result.summary is not None
    return result.summary


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """How one of several runs ended: ``summary`` or ``failure`` is None."""

    out: Path
    config: TrainConfig
    summary: TrainSummary | None
    failure: EmbedcacheError | OSError | None


def sweep(
    cache_path: Path,
    *,
    runs: dict[Path, TrainConfig],
    device: str = "auto",
    progress: Progress = SILENT,
) -> list[SweepResult]:
    """Train several carry-ons, by folder, on one cache: each comes to what `train` alone makes.

    Those of one shape are stacked: they go through the same products, and what is read for one is
    read for all that see it. One that fails leaves the others alone, and is reported. Under
    ``torchrun``, the runs are dealt out to the processes, and every one returns all results.

    Runs that are finished already, with these very settings, are passed over, so that a sweep that
    was stopped goes on by the same call. Raises what `train` does for settings and folders, before
    anything is written.
    """
    target = local_device(resolve_device(device))
    shared = _Shared(cache_path, target, progress)
    with joined(target) as ranks:
        done = {out: shared.finished(out, config) for out, config in runs.items()}
        todo = [out for out in runs if done[out] is None]
        for out in todo:
            shared.check(out, runs[out])
        ranks.wait()  # none writes before all have checked
        trained = _train(shared, {out: runs[out] for out in todo[ranks.rank :: ranks.count]})
        results = {result.out: result for some in ranks.gather(trained) for result in some}
    return [
        results.get(out) or SweepResult(out=out, config=config, summary=done[out], failure=None)
        for out, config in runs.items()
    ]


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
    shared = _Shared(cache_path, resolve_device(device), SILENT)
    shared.check(out, config)
    cache, trainer = shared.cache, shared.trainer
    tokens, dev_tokens = trainer.epoch_tokens(config.documents), 0
    if cache.has("dev"):
        dev = trainer.subset("dev", config.documents)
        dev_tokens = cache.split("dev").manifest.tokens if dev is None else dev.tokens
    step = config.steps_tokens(tokens)
    return TrainPlan(
        out=str(out),
        parameters=CarryOn(config.carryon, cache.attributes.base["hidden_size"]).parameter_count(),
        train_tokens=tokens,
        dev_tokens=dev_tokens,
        tokens_per_step=step,
        steps=config.epochs * -(-tokens // step),
        loss=_loss_name(config, shared.device),
        device=str(shared.device),
    )


class _Shared:
    """An open cache and what is checked before anything is written."""

    def __init__(
        self, cache_path: Path, device: torch.device, progress: Progress, ranks: Ranks = ALONE
    ):
        self.cache = Cache(cache_path)
        self.device = device
        self.progress = progress
        self.ranks = ranks
        self.trainer = Trainer(self.cache, self.device, progress, ranks)

    def request(self, config: TrainConfig) -> dict[str, Any]:
        """Return what a checkpoint must have been made for, to be gone on from."""
        return {
            "cache": self.cache.manifest.hash,
            "config": config.to_dict(),
            "device": self.device.type,
            "processes": self.ranks.count,
        }

    def check(self, out: Path, config: TrainConfig) -> None:
        """Raise for a tap or documents that are not there, or a folder that holds something."""
        self.cache.require_taps(config.carryon.taps)
        self.trainer.epoch_tokens(config.documents)
        check_out(out, self.request(config))

    def finished(self, out: Path, config: TrainConfig) -> TrainSummary | None:
        """Return how a run ended that was this very one, None where there is none in ``out``."""
        if not (out / CONFIG_FILE).is_file():
            return None
        record = read_record(out)
        same = (record.training, record.cache.get("manifest")) == (
            config.to_dict(),
            self.cache.manifest.hash,
        )
        return TrainSummary(**record.results) if same else None


def _train(shared: _Shared, runs: dict[Path, TrainConfig]) -> list[SweepResult]:
    for config in runs.values():
        shared.trainer.sample(config.carryon.taps)  # what cannot be trained on leaves nothing
    members: list[Member] = []
    ranks = shared.ranks
    ranks.wait()  # none writes before all have checked
    with ExitStack() as locks:
        for out, config in runs.items():
            if ranks.leads:
                with writing(out):
                    locks.enter_context(writer_lock(out))
                check_out(out, shared.request(config))  # it may have changed meanwhile
            members.append(
                Member(
                    out,
                    config,
                    loss=_loss_name(config, shared.device),
                    tokens=shared.trainer.epoch_tokens(config.documents),
                    request=shared.request(config),
                    progress=shared.progress,
                    writes=ranks.leads,
                )
            )
        ranks.wait()  # the folders are there
        for stack in shared.trainer.stacks(members):
            shared.trainer.run(stack)
        for member in members:
            if member.summary is not None and ranks.leads:
                with writing(member.out):
                    (member.out / LOCK).unlink()
        ranks.wait()
    return [
        SweepResult(out=m.out, config=m.config, summary=m.summary, failure=m.failure)
        for m in members
    ]


def _loss_name(config: TrainConfig, device: torch.device) -> str:
    if config.loss != "auto":
        return config.loss
    return "shortlist" if device.type == "cpu" else "exact"
