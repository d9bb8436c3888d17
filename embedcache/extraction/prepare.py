"""Preparing a run: load the base, calibrate the codec, estimate, and store what blocks rely on."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import zarr

from embedcache.base.forward import BlockForward
from embedcache.base.load import Base
from embedcache.base.taps import is_tied, token_embedding_of
from embedcache.cache.base_arrays import write_base_array
from embedcache.cache.codecs.integers import Codec
from embedcache.cache.format.layout import CODEC, CacheAttributes
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.extraction.calibrate_cache import (
    Calibrations,
    calibrations_of,
    codecs_by_split,
    store_calibrations,
)
from embedcache.extraction.estimate import FREE, Estimate, estimate, run_trial, stored_cost
from embedcache.extraction.request import Request
from embedcache.extraction.sample import BlockId, ComputedBatches
from embedcache.store.files import fsync_path, fsync_tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A loaded base and what was found out with it."""

    base: Base
    forward: BlockForward
    calibrations: Calibrations
    codecs: dict[str, dict[str, Codec]]
    """Codecs by tap, by split."""
    computed: ComputedBatches
    estimate: Estimate
    started: float
    """When the base was loaded, by `time.perf_counter`."""


def prepare(
    request: Request,
    attributes: CacheAttributes,
    folder: Path,
    splits: dict[str, SplitTokens],
    blocks: list[BlockId],
    *,
    fresh: bool,
    scratch: Path | None,
) -> Prepared:
    """Load the base, calibrate the codec and estimate the run. Nothing is stored.

    Args:
        request: the request.
        attributes: the attributes of the cache.
        folder: the cache, or the scratch folder that holds its tokens.
        splits: the tokens of each split.
        blocks: the blocks to compute.
        fresh: whether no train block is committed.
        scratch: folder for trial files, on the disk of the cache.
    """
    settings, progress = attributes.settings, request.progress
    base = request.load_base(attributes.environment["dtype"])
    started = time.perf_counter()
    forward = BlockForward(
        base,
        settings.taps,
        block_tokens=settings.block_tokens,
        batch_tokens=settings.batch_tokens,
    )
    computed = ComputedBatches()
    with progress.bar("calibrating the codec", None, ""):
        calibrations = calibrations_of(
            folder, splits["train"], forward, base, settings, computed, fresh=fresh
        )
    codecs = codecs_by_split(settings, calibrations, base)
    trial = run_trial(base, forward, splits, blocks, settings, codecs, computed, progress, scratch)
    tensors = {} if (folder / "base").is_dir() else base_tensors(base)
    if not (folder / CODEC).is_dir():
        for tap, found in calibrations.items():
            parts = (found.mean_H, found.centre_H, found.predictor_HH, found.inverse_HH)
            tensors |= {f"{CODEC}/{tap}/{number}": part for number, part in enumerate(parts)}
    stored = stored_cost(tensors, scratch) if tensors else FREE
    estimated = estimate(
        folder,
        splits,
        blocks,
        device=base.device,
        out=request.out,
        trial=trial,
        stored=stored,
        computed_tokens=computed.tokens,
        spent=time.perf_counter() - started,
    )
    return Prepared(
        base=base,
        forward=forward,
        calibrations=calibrations,
        codecs=codecs,
        computed=computed,
        estimate=estimated,
        started=started,
    )


def base_tensors(base: Base) -> dict[str, torch.Tensor]:
    """Return the tensors of the base that training needs, by path: head and token embedding."""
    tensors = {"head/weight": base.head.weight_VH}
    if base.head.bias_V is not None:
        tensors["head/bias"] = base.head.bias_V
    if not is_tied(base.model):
        embedding = token_embedding_of(base.model).get_parameter("weight")
        tensors["token_embedding/weight"] = embedding
    return tensors


def store(prepared: Prepared, out: Path, staging: Path) -> None:
    """Store the arrays of the base and the calibrations in the cache, unless they are there."""
    store_base(out, prepared.base, staging)
    store_calibrations(out, prepared.calibrations, staging)


def store_base(out: Path, base: Base, staging: Path) -> None:
    """Store the arrays of the base: made whole in ``staging``, then moved into place."""
    if (out / "base").is_dir():
        return
    made = staging / "base"
    try:
        group = zarr.create_group(made, zarr_format=3)
        group.create_group("head").attrs.update(dict(base.head.settings))
        for name, tensor in base_tensors(base).items():
            write_base_array(group, name, tensor)
        fsync_tree(made)
        made.rename(out / "base")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(out)
