"""The codecs of a cache: their calibrations on disk, and the codec of each tap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import zarr

from embedcache.cache.base_arrays import read_array, read_token_embedding, write_base_array
from embedcache.cache.codecs.integers import STATELESS, Codec, codec_name
from embedcache.cache.codecs.transform import Calibration, TransformCodec
from embedcache.cache.format.layout import CODEC, ExtractSettings
from embedcache.cache.shards.errors import translate_read_errors
from embedcache.errors import CacheError

_ARRAYS = {
    "mean": "mean_H",
    "centre": "centre_H",
    "predictor": "predictor_HH",
    "inverse": "inverse_HH",
}
"""The field of `Calibration` that each array holds."""


def save_calibration(group: zarr.Group, calibration: Calibration) -> None:
    """Write a calibration into an empty Zarr group."""
    for name, field in _ARRAYS.items():
        write_base_array(group, name, getattr(calibration, field))
    group.attrs.update({"step": calibration.step, "measured": calibration.measured})


def load_calibration(cache: Path, tap: str) -> Calibration:
    """Read the calibration of a tap; raises ``CacheError`` if it is missing or damaged."""
    folder = cache / CODEC / tap
    with translate_read_errors(folder):
        attributes: dict[str, Any] = dict(zarr.open_group(folder, mode="r").attrs)
        arrays: dict[str, Any] = {field: read_array(folder / n) for n, field in _ARRAYS.items()}
        if any(value is None for value in arrays.values()):
            raise CacheError(f"{folder} lacks an array of the calibration: extract again")
        return Calibration(
            **arrays, step=float(attributes["step"]), measured=attributes["measured"]
        )


def open_codecs(cache: Path, split: str, settings: ExtractSettings) -> dict[str, Codec]:
    """Return the codec of each tap of a split; raises ``CacheError`` for a damaged calibration."""
    if codec_name(split, settings.codec) in STATELESS:
        return codecs_of(split, settings, {}, None)
    calibrations = {tap: load_calibration(cache, tap) for tap in settings.taps}
    return codecs_of(split, settings, calibrations, read_token_embedding(cache))


def codecs_of(
    split: str,
    settings: ExtractSettings,
    calibrations: dict[str, Calibration],
    embedding_VH: torch.Tensor | None,
) -> dict[str, Codec]:
    """Return the codec of each tap of a split; only ``transform`` needs the last two arguments."""
    name = codec_name(split, settings.codec)
    if name in STATELESS:
        return dict.fromkeys(settings.taps, STATELESS[name])
    if embedding_VH is None:
        raise ValueError(f"the codec {name} needs the base's token embedding")
    return {tap: TransformCodec(calibrations[tap], embedding_VH) for tap in calibrations}
