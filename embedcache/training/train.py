"""Stage two: train carry-ons from a cache. The base is never opened."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.cache import Cache
from embedcache.carryon.registry import build
from embedcache.carryon.saving import CONFIG_FILE, read_record
from embedcache.device import resolve_device
from embedcache.errors import EmbedcacheError
from embedcache.loss.shortlist.sampler import DRAWS
from embedcache.progress import SILENT, Progress
from embedcache.store.files import LOCK, translate_write_errors, writer_lock
from embedcache.training.budget.allocator import spare_reserves
from embedcache.training.budget.planning import plan_memory
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import ALONE, Ranks, joined, local_device
from embedcache.training.run.output import check_out
from embedcache.training.run.run import Member, TrainSummary
from embedcache.training.trainer import Trainer

SHORTER = 8
"""A shortlist pays where a vocabulary is so many times what it samples: it holds labels, too."""

__all__ = ["SweepResult", "TrainPlan", "TrainSummary", "preview", "sweep", "train"]


def train(
    cache_path: Path,
    *,
    out: Path,
    config: TrainConfig | None = None,
    device: str = "auto",
    memory: int | None = None,
    progress: Progress = SILENT,
) -> TrainSummary:
    """Train a carry-on on a cache's train split into the folder ``out``.

    The dev split picks the epoch that is kept. A run that was interrupted goes on where its last
    checkpoint stands and gives the same weights as one that was not (same device and threads).

    Under ``torchrun``, every process takes a share of each step's tokens (data-parallel).

    ``memory`` is a budget in bytes: how a step is computed is chosen so that tensors take no more
    of the device (CUDA's own context is not counted), and on CUDA the allocator is held to it. What
    is learned stays the same up to rounding and the draws of a shortlist.

    Raises:
        UsageError: for settings that cannot be.
        CacheError: if the cache is incomplete, damaged or lacks a tap.
        OutputError: if ``out`` holds something else, or a finished carry-on.
        NumericsError: if the loss or gradient is not finite; the last good state is kept.
        DeviceMemoryError: if the budget holds no sequence, or the device runs out of memory.
    """
    runs = {out: config or TrainConfig()}
    target = _target(device, memory)
    with joined(target) as ranks:
        shared = _Shared(cache_path, target, progress, ranks, memory)
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
    memory: int | None = None,
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
    target = _target(device, memory)
    shared = _Shared(cache_path, target, progress, memory=memory)
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
    memory: str | None


def preview(
    cache_path: Path,
    *,
    out: Path,
    config: TrainConfig,
    device: str = "auto",
    memory: int | None = None,
) -> TrainPlan:
    """Make every check that `train` makes before it writes; return the plan."""
    shared = _Shared(cache_path, _target(device, memory), SILENT, memory=memory)
    shared.check(out, config)
    loss, plan = _loss_name(config, shared.vocabulary), None
    if memory is not None:
        plan = plan_memory(shared.materials, [config], loss, memory)
    tokens = shared.materials.tokens("train", config.documents)
    step = config.steps_tokens(tokens)
    return TrainPlan(
        out=str(out),
        parameters=build(config.carryon, shared.materials.hidden).parameter_count(),
        train_tokens=tokens,
        dev_tokens=shared.materials.tokens("dev", config.documents),
        tokens_per_step=step,
        steps=config.epochs * -(-tokens // step),
        loss=loss,
        device=str(shared.device),
        memory=None if plan is None else str(plan),
    )


def _target(device: str, memory: int | None) -> torch.device:
    """Return the device named, whose allocator is sparing where there is a budget."""
    target = resolve_device(device)
    if memory is not None and target.type == "cuda":
        spare_reserves()  # before torch asks the device for anything: settings are read then
    return local_device(target)


class _Shared:
    """An open cache and what is checked before anything is written."""

    def __init__(
        self,
        cache_path: Path,
        device: torch.device,
        progress: Progress,
        ranks: Ranks = ALONE,
        memory: int | None = None,
    ):
        self.cache = Cache(cache_path)
        self.device = device
        self.progress = progress
        self.ranks = ranks
        self.trainer = Trainer(self.cache, self.device, progress, ranks, memory)
        self.materials = self.trainer.materials
        self.vocabulary: int = self.cache.attributes.base["vocab_size"]

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
        self.materials.tokens("train", config.documents)
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
        shared.materials.sample(config.carryon.taps)  # what cannot be trained on leaves nothing
    ranks = shared.ranks
    members = [
        Member(
            out,
            config,
            loss=_loss_name(config, shared.vocabulary),
            tokens=shared.materials.tokens("train", config.documents),
            request=shared.request(config),
            progress=shared.progress,
            ranks=ranks,
        )
        for out, config in runs.items()
    ]
    planned = shared.trainer.planned(members)
    ranks.wait()  # none writes before all have checked
    with ExitStack() as locks:
        for out, config in runs.items():
            if ranks.leads:
                with translate_write_errors(out):
                    locks.enter_context(writer_lock(out))
                check_out(out, shared.request(config))  # it may have changed meanwhile
        ranks.wait()  # the folders are there
        for stack, plan in planned:
            shared.trainer.run(stack, plan)
        for member in members:
            if member.summary is not None and ranks.leads:
                with translate_write_errors(member.out):
                    (member.out / LOCK).unlink()
        ranks.wait()
    return [
        SweepResult(out=m.out, config=m.config, summary=m.summary, failure=m.failure)
        for m in members
    ]


def _loss_name(config: TrainConfig, vocabulary: int) -> str:
    """Return the loss asked for, or a shortlist where that is much shorter than the vocabulary."""
    if config.loss != "auto":
        return config.loss
    return "shortlist" if vocabulary >= SHORTER * (config.samples or DRAWS) else "exact"
