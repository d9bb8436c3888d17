"""Stage two: train a carry-on from a cache. The base is never opened."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.cache.cache import Cache
from embedcache.carryon.registry import build
from embedcache.carryon.saving import CONFIG_FILE, read_record
from embedcache.device import resolve_device
from embedcache.loss.shortlist.sampler import DRAWS
from embedcache.progress import SILENT, Progress
from embedcache.store.files import LOCK, translate_write_errors, writer_lock
from embedcache.training.budget.allocator import configure_allocator
from embedcache.training.budget.probe import plan_memory
from embedcache.training.config import TrainConfig, config_from
from embedcache.training.distributed import ALONE, Ranks, joined, local_device
from embedcache.training.run.checkpoint import check_out
from embedcache.training.run.report import TrainSummary
from embedcache.training.run.run import Run
from embedcache.training.trainer import Trainer
from embedcache.units import parse_bytes

LONGER = 8
"""``loss="auto"`` uses a shortlist if the vocabulary is at least this many times the sampled
tokens; a shortlist also holds labels."""

__all__ = ["TrainPlan", "TrainSummary", "preview", "train"]


def train(
    cache: str | Path,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
    **settings: Any,
) -> TrainSummary:
    """Train a carry-on on the train split of a cache.

    The epoch with the lowest dev loss is kept. An interrupted run is resumed by the same call, and
    ends with the weights of a run that was not interrupted (on the same device and threads). Under
    ``torchrun`` each process takes a share of each step's tokens (data parallelism).

        embedcache.train("cache", out="carryon", lr=1e-3, width=128)

    Args:
        cache: folder of a finished cache.
        out: folder of the carry-on: a new or empty one, or that of the interrupted run.
        config: the configuration of the run; by default it is made of ``settings``.
        memory: budget of device memory, such as ``"1GB"``, or bytes. Step settings are chosen so
            that tensors fit in the budget (CUDA's own context is not counted). On CUDA the
            allocator is limited to the budget. A run that runs out of memory continues with a
            leaner plan. The result is the same up to rounding and the sampling of shortlists.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: receives bars and remarks.
        settings: names and values of `TrainConfig` and of the carry-on's configuration
            (`BranchConfig`, or that of ``kind=``).

    Returns:
        The outcome of the run.

    Raises:
        UsageError: for settings that are unknown or out of range.
        CacheError: if the cache is incomplete or damaged, or lacks a tap.
        OutputError: if ``out`` holds other files or a finished carry-on.
        NumericsError: if the loss or gradient is not finite; the last finite state is kept.
        DeviceMemoryError: if the budget or the device has too little memory for a sequence.
    """
    request = config_from(config, settings)
    target = training_device(device, memory)
    with joined(target) as ranks:
        session = Session(cache, target, progress, ranks, memory)
        session.check(Path(out), request)
        (run,) = session.train({Path(out): request})
    if run.failure is not None:
        raise run.failure
    assert run.summary is not None
    return run.summary


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What a run would do: its size, its steps, its loss, and its plan for the memory budget."""

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
    cache: str | Path,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    **settings: Any,
) -> TrainPlan:
    """Make every check that `train` makes before it writes, and return the plan.

    Arguments and errors are those of `train`.
    """
    request = config_from(config, settings)
    session = Session(cache, training_device(device, memory), memory=memory)
    session.check(Path(out), request)
    loss, plan = session.loss(request), None
    if session.memory is not None:
        plan = plan_memory(session.inputs, [request], loss, session.memory)
    tokens = session.inputs.tokens("train", request.documents)
    step = request.steps_tokens(tokens)
    return TrainPlan(
        out=str(out),
        parameters=build(request.carryon, session.inputs.hidden).parameter_count(),
        train_tokens=tokens,
        dev_tokens=session.inputs.tokens("dev", request.documents),
        tokens_per_step=step,
        steps=request.epochs * -(-tokens // step),
        loss=loss,
        device=str(session.device),
        memory=None if plan is None else str(plan),
    )


def training_device(device: str, memory: str | int | None) -> torch.device:
    """Return the named device; with a budget, configure its allocator to reserve little."""
    target = resolve_device(device)
    if memory is not None and target.type == "cuda":
        configure_allocator()  # before PyTorch first uses the device
    return local_device(target)


class Session:
    """An open cache, and the runs that are checked and trained on it."""

    def __init__(
        self,
        cache: str | Path,
        device: torch.device,
        progress: Progress = SILENT,
        ranks: Ranks = ALONE,
        memory: str | int | None = None,
    ):
        self.cache = Cache(Path(cache))
        self.device = device
        self.memory = parse_bytes(memory) if isinstance(memory, str) else memory
        self._progress, self._ranks = progress, ranks
        self._trainer = Trainer(self.cache, device, progress, ranks, self.memory)
        self.inputs = self._trainer.inputs

    def check(self, out: Path, config: TrainConfig) -> None:
        """Raise for a tap or documents that the cache lacks, or a folder that holds other files."""
        self.cache.require_taps(config.carryon.taps)
        self.inputs.tokens("train", config.documents)
        check_out(out, self._request(config))

    def loss(self, config: TrainConfig) -> str:
        """Return the loss of a configuration: ``exact`` or ``shortlist``."""
        if config.loss != "auto":
            return config.loss
        vocabulary: int = self.cache.attributes.base["vocab_size"]
        return "shortlist" if vocabulary >= LONGER * (config.samples or DRAWS) else "exact"

    def finished(self, out: Path, config: TrainConfig) -> TrainSummary | None:
        """Return the summary of this run if it is already finished, else None."""
        if not (out / CONFIG_FILE).is_file():
            return None
        record = read_record(out)
        same = (record.training, record.cache.get("manifest")) == (
            config.to_dict(),
            self.cache.manifest.hash,
        )
        return TrainSummary(**record.results) if same else None

    def train(self, configs: Mapping[Path, TrainConfig]) -> list[Run]:
        """Train carry-ons by folder; a failed run holds its error and does not stop the others."""
        for config in configs.values():
            self.inputs.sample(config.carryon.taps)  # embeddings that are not finite raise here
        ranks = self._ranks
        runs = [
            Run(
                out,
                config,
                loss=self.loss(config),
                tokens=self.inputs.tokens("train", config.documents),
                request=self._request(config),
                progress=self._progress,
                ranks=ranks,
            )
            for out, config in configs.items()
        ]
        planned = self._trainer.planned(runs)
        ranks.wait()  # no process writes before all have checked
        with ExitStack() as locks:
            for run in runs:
                if ranks.leads:
                    with translate_write_errors(run.out):
                        locks.enter_context(writer_lock(run.out))
                    check_out(run.out, self._request(run.config))  # it may have changed meanwhile
            ranks.wait()  # the folders are there
            for stack, plan in planned:
                self._trainer.run(stack, plan)
            for run in runs:
                if run.summary is not None and ranks.leads:
                    with translate_write_errors(run.out):
                        (run.out / LOCK).unlink()
            ranks.wait()
        return runs

    def _request(self, config: TrainConfig) -> dict[str, Any]:
        """Return all that a checkpoint must have been made with to be resumed."""
        return {
            "cache": self.cache.manifest.hash,
            "config": config.to_dict(),
            "device": self.device.type,
            "processes": self._ranks.count,
        }
