"""Calibrating the codec of a cache before its first block: sample, fit each tap, store.

Axes: B sequences of a batch, T time, N rows, H hidden, V vocabulary.
"""

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
from embedcache.extraction.sample import ComputedBatches, sample_batches
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
    computed: ComputedBatches,
    *,
    fresh: bool,
) -> Calibrations:
    """Return the calibration of each tap: the cache's own, or a new one, not yet stored.

    Args:
        cache: the cache.
        train: its train tokens.
        forward: the forward pass of the base.
        base: the base.
        settings: the settings of the extraction.
        computed: receives the embeddings of the batches that a new calibration is fitted to.
        fresh: whether no train block is committed.

    Raises:
        CacheError: if the calibration is missing and blocks were encoded with it.
    """
    if settings.codec != "transform" or not train.blocks:
        return {}
    if (cache / CODEC).is_dir():
        return {tap: load_calibration(cache, tap) for tap in settings.taps}
    if not fresh:
        raise CacheError(
            f"{cache / CODEC} is missing, and blocks were encoded with it: extract into a new "
            "folder"
        )
    return new_calibrations(train, forward, base, settings, computed)


def new_calibrations(
    train: SplitTokens,
    forward: BlockForward,
    base: Base,
    settings: ExtractSettings,
    computed: ComputedBatches,
) -> Calibrations:
    """Return calibrations that are fitted to a sample of train."""
    samples = _samples(train, forward, base, settings, computed)
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
    return found


def codecs_by_split(
    settings: ExtractSettings, calibrations: Calibrations, base: Base
) -> dict[str, dict[str, Codec]]:
    """Return the codec of each tap by split, except where an empty train split has none."""
    embedding_VH = embedding_of(base) if calibrations else None
    return {
        name: codecs_of(name, settings, calibrations, embedding_VH)
        for name in SPLITS
        if calibrations or codec_name(name, settings.codec) in STATELESS
    }


def embedding_of(base: Base) -> torch.Tensor:
    """Return the base's token embedding [V, H] on the host."""
    return token_embedding_of(base.model).get_parameter("weight").detach().cpu()


def store_calibrations(
    cache: Path, calibrations: Calibrations, staging: Path, *, expected: Digests | None = None
) -> None:
    """Store the calibrations once: made whole in ``staging``, then moved into place.

    Args:
        cache: the cache.
        calibrations: the calibration of each tap.
        staging: the staging folder of this attempt.
        expected: digests of a damaged calibration to be replaced.

    Raises:
        CacheError: if the files do not match ``expected``: blocks were encoded with those.
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
                f"the calibration in {cache / CODEC} is damaged, and the new calibration is not "
                "the one that blocks were encoded with (another machine or version?): restore "
                "that folder from a copy, or extract into a new folder"
            )
        if (cache / CODEC).exists():
            (cache / CODEC).rename(old)
        made.rename(cache / CODEC)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    fsync_path(cache)


def _samples(
    train: SplitTokens,
    forward: BlockForward,
    base: Base,
    settings: ExtractSettings,
    computed: ComputedBatches,
) -> dict[str, Sample]:
    """Compute batches from all over train; return rows of each tap on the host.

    A few rows of many batches are better than many rows of a few: a corpus differs from place to
    place.
    """
    wanted = max(SAMPLE_ROWS, ROWS_PER_COMPONENT * base.identity.hidden_size)
    blocks = [("train", block) for block in range(train.blocks)]
    parts_NH: dict[str, list[torch.Tensor]] = {tap: [] for tap in settings.taps}
    parts: list[tuple[Array, Array]] = []
    for batch in sample_batches({"train": train}, blocks, forward):
        rows_B2 = batch.rows_B2
        x_BTH = forward.batch(batch.ids_N, rows_B2)
        computed.add(batch, x_BTH)
        x_NH = {tap: batch.unpadded(x) for tap, x in x_BTH.items()}
        ids_N = batch.ids()
        used = train.used(batch.block[1])
        targets_N, keep_N = _usable(*used, rows_B2, finite_rows(x_NH).cpu().numpy())
        keep_N = keep_N[:: max(1, math.ceil(len(keep_N) * BATCHES / wanted))]
        parts.append((ids_N[keep_N], targets_N[keep_N]))
        for tap, x in x_NH.items():
            parts_NH[tap].append(x[torch.from_numpy(keep_N).to(x.device)].cpu())
        if sum(len(ids_N) for ids_N, _ in parts) >= wanted:
            break
    ids_N, targets_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(ids_N) < 2:
        raise NumericsError(
            "the sampled train embeddings hold no finite sequence to calibrate on: the base "
            "overflows. Use `dtype=` 'float32' or 'bfloat16' and another `out=`"
        )
    part_N = np.repeat(np.arange(len(parts)), [len(ids_N) for ids_N, _ in parts])
    return {tap: Sample(torch.cat(x), ids_N, targets_N, part_N) for tap, x in parts_NH.items()}


def _usable(
    ids_N: Array, loss_mask_N: Array, rows_B2: Array, finite_N: Array
) -> tuple[Array, Array]:
    """Return the targets of a batch's rows (-1 for none), and the rows of finite sequences.

    Args:
        ids_N: token ids of the batch's block.
        loss_mask_N: loss mask of that block.
        rows_B2: first row and row past the last of each sequence.
        finite_N: whether each row of the batch is finite.
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
