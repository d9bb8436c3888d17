"""Calibrating a cache's codec before its first block: sample batches, fit each tap, store."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.base.forward import BlockForward
from embedcache.base.load import Base
from embedcache.base.taps import FINAL, token_embedding_of
from embedcache.cache.base_arrays import Cost, base_array_cost
from embedcache.cache.calibration import codecs_of, load_calibration, save_calibration
from embedcache.cache.codecs.integers import STATELESS, Codec, codec_name
from embedcache.cache.codecs.transform import Calibration
from embedcache.cache.format.layout import CODEC, DEFAULT_BITS, SPLITS, ExtractSettings
from embedcache.cache.manifest.digests import Digests
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.errors import CacheError, NumericsError
from embedcache.extraction.calibrate import (
    BATCHES,
    ROWS_PER_COMPONENT,
    SAMPLE_ROWS,
    Sample,
    calibrate,
)
from embedcache.extraction.encode import finite_rows
from embedcache.extraction.sample import Item, Known, SampledBlock, ids_of, rows_of, spread
from embedcache.store.files import fsync_path, fsync_tree

Array = np.ndarray[Any, Any]

Calibrations = dict[str, Calibration]
"""By tap; empty where the codec needs none."""


def calibrations_of(
    cache: Path,
    train: SplitTokens,
    forward: BlockForward,
    base: Base,
    settings: ExtractSettings,
    *,
    fresh: bool,
    again: bool = False,
) -> tuple[Calibrations, Known]:
    """Return the calibration of each tap: the cache's own, or a new one, not yet stored.

    Returns with a new one the batches that were computed for the sample: they need not be again.
    ``fresh``: no train block is committed yet; if one is, a lost calibration cannot be made again,
    and ``CacheError`` is raised. ``again``: make what is there anew; what comes out is held to the
    old one's seal by `store_calibrations`.
    """
    if settings.codec != "transform" or not train.blocks:
        return {}, {}
    if (cache / CODEC).is_dir() and not again:
        return {tap: load_calibration(cache, tap) for tap in settings.taps}, {}
    if not fresh and not again:
        raise CacheError(
            f"{cache / CODEC} is missing, and blocks were coded with it: extract into a new folder"
        )
    samples, known = _samples(train, forward, base, settings)
    embedding_VH = embedding_of(base)
    bits = None if settings.quality is not None else settings.bits or DEFAULT_BITS
    found: Calibrations = {}
    for tap in sorted(settings.taps, key=lambda tap: tap != FINAL):
        found[tap] = calibrate(
            samples[tap].to(base.device),
            embedding_VH,
            head=base.head if tap == FINAL else None,
            bits=bits,
            quality=settings.quality if tap == FINAL else None,
        )
        bits = found[tap].measured["bits"] if bits is None else bits
    return found, known


def codecs_by_split(
    settings: ExtractSettings, calibrations: Calibrations, base: Base
) -> dict[str, dict[str, Codec]]:
    """Return the codec of each tap of each split, but for a split that is empty and needs more."""
    embedding_VH = embedding_of(base) if calibrations else None
    return {
        name: codecs_of(name, settings, calibrations, embedding_VH)
        for name in SPLITS
        if calibrations or codec_name(name, settings.codec) in STATELESS
    }


def embedding_of(base: Base) -> torch.Tensor:
    """Return the base's token embedding [V, H] on the host."""
    return token_embedding_of(base.model).get_parameter("weight").detach().cpu()


def calibration_cost(cache: Path, calibrations: Calibrations, scratch: Path | None) -> Cost:
    """Return what `store_calibrations` will take, about."""
    if (cache / CODEC).is_dir():
        return Cost()
    parts = [
        base_array_cost(part, scratch)
        for found in calibrations.values()
        for part in (found.mean_H, found.centre_H, found.predictor_HH, found.inverse_HH)
    ]
    return sum(parts, Cost())


def store_calibrations(
    cache: Path, calibrations: Calibrations, staging: Path, *, expected: Digests | None = None
) -> None:
    """Store the calibrations, made in ``staging``, whole and once, before the first block.

    ``expected`` is the seal of a damaged calibration whose place they take: raises ``CacheError``
    where they are not the very same, since blocks were coded with that.
    """
    if not calibrations or ((cache / CODEC).is_dir() and expected is None):
        return
    made, old = staging / CODEC, staging / f"{CODEC}.old"
    for folder in (made, old):
        shutil.rmtree(folder, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        group = zarr.create_group(made, zarr_format=3)
        for tap, found in calibrations.items():
            save_calibration(group.create_group(tap), found)
        fsync_tree(made)
        if expected is not None and Digests.of(staging, made) != expected:
            raise CacheError(
                f"the calibration in {cache / CODEC} is damaged, and what was calibrated anew is "
                "not the one that blocks were coded with (another machine or version?): restore "
                "that folder from a copy, or extract into a new folder."
            )
        if (cache / CODEC).exists():
            (cache / CODEC).rename(old)
        made.rename(cache / CODEC)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(cache)


def _samples(
    train: SplitTokens, forward: BlockForward, base: Base, settings: ExtractSettings
) -> tuple[dict[str, Sample], Known]:
    """Compute batches spread over train; return rows of each tap, on the host, and the batches.

    Few rows of many batches rather than many of few: a corpus differs from place to place.
    """
    wanted = max(SAMPLE_ROWS, ROWS_PER_COMPONENT * base.identity.hidden_size)
    items = [("train", block) for block in range(train.blocks)]
    blocks: dict[Item, SampledBlock] = {}
    known: Known = {}
    x_PNH: dict[str, list[torch.Tensor]] = {tap: [] for tap in settings.taps}
    parts: list[tuple[Array, Array]] = []
    for item, number in spread({"train": train}, items, forward, blocks):
        rows_B2 = blocks[item].rows(number)
        x_BTH = forward.batch(blocks[item].ids_N, rows_B2)
        known.setdefault(item, {})[number] = {tap: x.cpu() for tap, x in x_BTH.items()}
        x_NH = {tap: rows_of(x, rows_B2) for tap, x in x_BTH.items()}
        ids_N = ids_of(blocks[item].ids_N, rows_B2)
        targets_N, keep_N = _usable(*train.used(item[1]), rows_B2, finite_rows(x_NH).cpu().numpy())
        keep_N = keep_N[:: max(1, math.ceil(len(keep_N) * BATCHES / wanted))]
        parts.append((ids_N[keep_N], targets_N[keep_N]))
        for tap, x in x_NH.items():
            x_PNH[tap].append(x[torch.from_numpy(keep_N).to(x.device)].cpu())
        if sum(len(ids_N) for ids_N, _ in parts) >= wanted:
            break
    ids_N, targets_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(ids_N) < 2:
        raise NumericsError(
            "the sampled train embeddings hold no finite sequence to calibrate on: the base "
            "overflows. Try --dtype float32 or bfloat16 and another --out."
        )
    part_N = np.repeat(np.arange(len(parts)), [len(ids_N) for ids_N, _ in parts])
    samples = {tap: Sample(torch.cat(x), ids_N, targets_N, part_N) for tap, x in x_PNH.items()}
    return samples, known


def _usable(
    ids_N: Array, loss_mask_N: Array, rows_B2: Array, finite_N: Array
) -> tuple[Array, Array]:
    """Return targets (-1 is none) of a batch's rows, and the places of finite sequences.

    ``ids_N`` and ``loss_mask_N`` are of its block, ``finite_N`` of its rows.
    """
    targets, keep, start = [], [np.empty(0, np.int64)], 0
    for first, stop in rows_B2.tolist():
        following = slice(first + 1, stop)
        targets.append(np.append(np.where(loss_mask_N[following], ids_N[following], -1), -1))
        places = np.arange(start, start + stop - first)
        if finite_N[places].all():
            keep.append(places)
        start += stop - first
    return np.concatenate(targets), np.concatenate(keep)
