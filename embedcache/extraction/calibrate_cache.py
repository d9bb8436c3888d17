"""Calibrating a cache's codec before its first block: sample blocks, fit each tap, store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.base.load import Base
from embedcache.base.taps import FINAL, token_embedding_of
from embedcache.cache.base_arrays import base_array_bytes
from embedcache.cache.codecs import STATELESS, Codec, codec_name
from embedcache.cache.layout import CODEC, DEFAULT_BITS, SPLITS, ExtractSettings
from embedcache.cache.seal import fsync_tree
from embedcache.cache.sealed import Seal
from embedcache.cache.tokens import SplitTokens
from embedcache.cache.transform import Calibration, codecs_of
from embedcache.errors import CacheError, NumericsError
from embedcache.extraction.calibrate import ROWS_PER_COMPONENT, SAMPLE_ROWS, Sample, calibrate
from embedcache.extraction.encoder import finite_rows
from embedcache.extraction.forward import BlockForward
from embedcache.extraction.measure import Item
from embedcache.files import fsync_path

Array = np.ndarray[Any, Any]
Embeddings = dict[str, torch.Tensor]


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
) -> tuple[Calibrations, dict[Item, Embeddings]]:
    """Return the calibration of each tap: the cache's own, or a new one, not yet stored.

    Returns with a new one the blocks that were computed for the sample, on the host: they need not
    be computed again. ``fresh``: no train block is committed yet; if one is, a lost calibration
    cannot be made again, and ``CacheError`` is raised. ``again``: make what is there anew; what
    comes out is held to the old one's seal by `store_calibrations`.
    """
    if settings.codec != "transform" or not train.blocks:
        return {}, {}
    if (cache / CODEC).is_dir() and not again:
        return {tap: Calibration.load(cache, tap) for tap in settings.taps}, {}
    if not fresh and not again:
        raise CacheError(
            f"{cache / CODEC} is missing, and blocks were coded with it: extract into a new folder"
        )
    computed, rows = {}, []
    for block in _sampled_blocks(train.blocks, settings.block_tokens, base.identity.hidden_size):
        ids_N, rows_S2, _ = train.read(block)
        x_NH = forward(ids_N, rows_S2)
        rows.append(_usable(ids_N, train.used(block)[1], rows_S2, finite_rows(x_NH).cpu().numpy()))
        computed["train", block] = {tap: x.cpu() for tap, x in x_NH.items()}
    embedding_VH = embedding_of(base)
    bits = None if settings.quality is not None else settings.bits or DEFAULT_BITS
    found: Calibrations = {}
    for tap in sorted(settings.taps, key=lambda tap: tap != FINAL):
        found[tap] = calibrate(
            _sample(tap, list(computed.values()), rows, base.device),
            embedding_VH,
            head=base.head if tap == FINAL else None,
            bits=bits,
            quality=settings.quality if tap == FINAL else None,
        )
        bits = found[tap].measured["bits"] if bits is None else bits
    return found, computed


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


def calibration_bytes(cache: Path, calibrations: Calibrations) -> int:
    """Return what `store_calibrations` will write, about."""
    if (cache / CODEC).is_dir():
        return 0
    return sum(
        base_array_bytes(part)
        for found in calibrations.values()
        for part in (found.mean_H, found.centre_H, found.predictor_HH, found.inverse_HH)
    )


def store_calibrations(
    cache: Path, calibrations: Calibrations, staging: Path, *, expected: Seal | None = None
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
            found.save(group.create_group(tap))
        fsync_tree(made)
        if expected is not None and Seal.of(staging, made) != expected:
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


def _sampled_blocks(blocks: int, block_tokens: int, hidden: int) -> list[int]:
    """Return the blocks to sample, spread over the split."""
    wanted = max(SAMPLE_ROWS, ROWS_PER_COMPONENT * hidden)
    count = min(blocks, -(-wanted // block_tokens))
    return sorted({blocks * i // count for i in range(count)})


def _usable(
    ids_N: Array, loss_mask_N: Array, rows_S2: Array, finite_N: Array
) -> tuple[Array, Array, Array]:
    """Return (row numbers, ids, targets) of a block's finite sequences; target -1 is none."""
    kept, targets = [], np.full(len(ids_N), -1, np.int64)
    for first, stop in rows_S2.tolist():
        if finite_N[first:stop].all():
            kept.append(np.arange(first, stop))
            following = slice(first + 1, stop)
            targets[first : stop - 1] = np.where(loss_mask_N[following], ids_N[following], -1)
    if not kept:
        return np.empty(0, np.int64), ids_N[:0], targets[:0]
    place = np.concatenate(kept)
    return place, ids_N[place], targets[place]


def _sample(
    tap: str,
    computed: list[Embeddings],
    rows: list[tuple[Array, Array, Array]],
    device: torch.device,
) -> Sample:
    x_NH = torch.cat(
        [
            x[tap][torch.from_numpy(place)].to(device).float()
            for x, (place, _, _) in zip(computed, rows, strict=True)
        ]
    )
    if len(x_NH) < 2:
        raise NumericsError(
            f"the sampled train embeddings of tap {tap} hold no finite sequence to calibrate on: "
            "the base overflows. Try --dtype float32 or bfloat16 and another --out."
        )
    ids, targets = (np.concatenate([row[i] for row in rows]) for i in (1, 2))
    return Sample(x_NH, ids, targets)
