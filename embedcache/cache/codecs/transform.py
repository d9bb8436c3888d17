"""The ``transform`` codec: embeddings as integers near their entropy.

    y = (x - b(token)) · F,  q = round(y / step),  x ≈ b(token) + step · q · B

b(token) = mean + (e - centre) · predictor is what the token alone says of its embedding, e being
the base's own embedding of the token at unit length. F decorrelates what is left in the metric of
the error that the logits see, so that one step serves every component; B is its inverse. A value is
rebuilt in the middle of its step, not at the centroid: carry-ons trained on centroids, which are
nearer in the mean square but of less variance, do far worse on exact embeddings (measured: a rise
of 0.8 % instead of 0.2 % at 1.5 bits). Calibrated once, on a sample of train: see
`embedcache.extraction.calibrate`.

Axes: N rows (any leading axes), H hidden, U distinct tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from embedcache.cache.base_arrays import read_array, write_base_array
from embedcache.cache.codecs.integers import STATELESS, Codec, codec_name
from embedcache.cache.format.layout import CODEC, ExtractSettings
from embedcache.cache.shards.errors import reading
from embedcache.errors import CacheError

Array = np.ndarray[Any, Any]

LARGEST = 2**15 - 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a tap's transform is: float32 or bfloat16 tensors on the CPU.

    ``mean_H``, ``centre_H``, ``predictor_HH``; ``inverse_HH`` is B, whose inverse F is; rows of B
    are components in order of falling variance. ``measured``: the rate and quality seen on the
    sample, for `info`.
    """

    mean_H: torch.Tensor
    centre_H: torch.Tensor
    predictor_HH: torch.Tensor
    inverse_HH: torch.Tensor
    step: float
    measured: dict[str, float]

    @cached_property
    def forward_HH(self) -> torch.Tensor:
        """F, float32."""
        return torch.linalg.inv(self.inverse_HH.double()).float()

    def save(self, group: zarr.Group) -> None:
        """Write the calibration into a group of its own."""
        for name in ("mean", "centre"):
            write_base_array(group, name, getattr(self, f"{name}_H"))
        for name in ("predictor", "inverse"):
            write_base_array(group, name, getattr(self, f"{name}_HH"))
        group.attrs.update({"step": self.step, "measured": self.measured})

    @classmethod
    def load(cls, cache: Path, tap: str) -> Calibration:
        """Read the calibration of a tap; raises ``CacheError`` if absent or damaged."""
        folder = cache / CODEC / tap
        with reading(folder):
            attributes: dict[str, Any] = dict(zarr.open_group(folder, mode="r").attrs)
            parts = {name: read_array(folder / name) for name in ("mean", "centre")}
            wide = {name: read_array(folder / name) for name in ("predictor", "inverse")}
            if any(part is None for part in (*parts.values(), *wide.values())):
                raise CacheError(f"{folder} lacks an array of the calibration: extract again")
            return cls(
                **{f"{name}_H": value for name, value in parts.items()},  # type: ignore[arg-type]
                **{f"{name}_HH": value for name, value in wide.items()},  # type: ignore[arg-type]
                step=float(attributes["step"]),
                measured=attributes["measured"],
            )


class TransformCodec(Codec):
    """Encodes and decodes with one tap's calibration and the base's token embedding [V, H]."""

    def __init__(self, calibration: Calibration, embedding_VH: torch.Tensor):
        self.calibration = calibration
        self._embedding_VH = embedding_VH
        self._placed: dict[tuple[str, torch.device], torch.Tensor] = {}

    def encode(self, x_NH: torch.Tensor, ids_N: Array) -> dict[str, torch.Tensor]:
        """Return the coefficients, int16."""
        q_NH = quantise(self.coefficients(x_NH, ids_N), self.calibration.step)
        return {"embeddings": q_NH}

    def coefficients(self, x_NH: torch.Tensor, ids_N: Array) -> torch.Tensor:
        """Return y, float32, on x's device."""
        residual_NH = x_NH.float() - self._from_token(ids_N, x_NH.device)
        return residual_NH @ self._on(x_NH.device, "forward_HH")

    def decode(self, stored: dict[str, torch.Tensor], ids_N: Array) -> torch.Tensor:
        """Return b(token) + step · q · B in bfloat16."""
        q_NH = stored["embeddings"]
        x_NH = (q_NH.float() * self.calibration.step) @ self._on(q_NH.device, "inverse_HH")
        return x_NH.add_(self._from_token(ids_N, q_NH.device)).to(torch.bfloat16)

    def _from_token(self, ids_N: Array, device: torch.device) -> torch.Tensor:
        """Return b of each token, float32; computed once for each distinct token."""
        distinct, place = np.unique(ids_N, return_inverse=True)
        e_UH = unit_rows(self._embedding_VH[torch.from_numpy(distinct)].to(device))
        b_UH = self._on(device, "mean_H") + (e_UH - self._on(device, "centre_H")) @ self._on(
            device, "predictor_HH"
        )
        return b_UH[torch.from_numpy(place.reshape(ids_N.shape)).to(device)]

    def _on(self, device: torch.device, name: str) -> torch.Tensor:
        if (name, device) not in self._placed:
            self._placed[name, device] = getattr(self.calibration, name).to(device).float()
        return self._placed[name, device]


def quantise(y_NH: torch.Tensor, step: float) -> torch.Tensor:
    """Return round(y / step), int16."""
    return (y_NH / step).round_().clamp_(-LARGEST, LARGEST).to(torch.int16)


def unit_rows(e_UH: torch.Tensor) -> torch.Tensor:
    """Return rows at unit length, float32; a row of zeros stays."""
    return torch.nn.functional.normalize(e_UH.float(), dim=-1)


def codecs_of(
    split: str,
    settings: ExtractSettings,
    calibrations: dict[str, Calibration],
    embedding_VH: torch.Tensor | None,
) -> dict[str, Codec]:
    """Return the codec of each tap of a split; only ``transform`` needs the last two."""
    name = codec_name(split, settings.codec)
    if name in STATELESS:
        return dict.fromkeys(settings.taps, STATELESS[name])
    if embedding_VH is None:
        raise ValueError(f"the codec {name} needs the base's token embedding")
    return {tap: TransformCodec(calibrations[tap], embedding_VH) for tap in calibrations}
