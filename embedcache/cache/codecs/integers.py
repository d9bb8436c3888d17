"""Codecs: embeddings to the integers that Zarr stores, and back.

``bf16`` and ``int8`` use standard Zarr v3 codecs only (blosc with byte shuffle and zstd, then
crc32c, inside shards), so any Zarr implementation reads them. ``transform`` is in
`embedcache.cache.codecs.transform`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from embedcache.errors import UsageError, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a codec.

    Attributes:
        group: its group under the split.
        dtype: its type.
        wide: whether it has columns.
        coder: the coder of its chunks; see `embedcache.cache.codecs.coders`.
        width: the number of columns; the base's hidden size if None.
    """

    group: str
    dtype: str
    wide: bool
    coder: str = "blosc"
    width: int | None = None

    def columns(self, hidden: int) -> tuple[int, ...]:
        """Return the shape of a row."""
        return (hidden if self.width is None else self.width,) if self.wide else ()


ARRAYS: dict[str, tuple[ArraySpec, ...]] = {
    "bf16": (ArraySpec("embeddings", "uint16", wide=True),),
    "int8": (
        ArraySpec("embeddings", "int8", wide=True),
        ArraySpec("scale", "float32", wide=False),
    ),
    "transform": (ArraySpec("embeddings", "int16", wide=True, coder="pco"),),
}
"""The arrays of each codec."""


class Codec(Protocol):
    """Turns embeddings into integers and back, on their device.

    Leading axes are free: N rows of a block, or B and T of a batch. ``ids_N`` are the token ids of
    the same leading axes, int64, on the host.
    """

    def encode(self, x_NH: torch.Tensor, ids_N: Array) -> dict[str, torch.Tensor]:
        """Return one tensor per array of the codec, by group name."""
        ...

    def decode(self, stored: dict[str, torch.Tensor], ids_N: Array) -> torch.Tensor:
        """Return the embeddings, bfloat16, from the tensors of ``encode``."""
        ...


class Bf16Codec(Codec):
    """The bit patterns of bfloat16: lossless for a base that computes in bfloat16."""

    def encode(self, x_NH: torch.Tensor, ids_N: Array) -> dict[str, torch.Tensor]:
        """Round to bfloat16 (to nearest even) and keep the bits."""
        return {"embeddings": x_NH.to(torch.bfloat16).contiguous().view(torch.uint16)}

    def decode(self, stored: dict[str, torch.Tensor], ids_N: Array) -> torch.Tensor:
        """View the bits as bfloat16, without a copy."""
        return stored["embeddings"].view(torch.bfloat16)


class Int8Codec(Codec):
    """Symmetric int8 with one float32 scale a token: q = round(x / scale), |q| <= 127."""

    def encode(self, x_NH: torch.Tensor, ids_N: Array) -> dict[str, torch.Tensor]:
        """Scale each token by its largest magnitude; a token of zeros keeps scale 1."""
        x_NH = x_NH.float()
        scale_N = x_NH.abs().amax(dim=-1) / 127
        scale_N = torch.where(scale_N == 0, 1.0, scale_N)
        q_NH = (x_NH / scale_N[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"embeddings": q_NH, "scale": scale_N}

    def decode(self, stored: dict[str, torch.Tensor], ids_N: Array) -> torch.Tensor:
        """Return scale * q in bfloat16."""
        q_NH, scale_N = stored["embeddings"], stored["scale"]
        # Written in place: float32 intermediates would take much more memory on the device.
        x_NH = torch.empty(q_NH.shape, dtype=torch.bfloat16, device=q_NH.device)
        return torch.mul(q_NH, scale_N[..., None], out=x_NH)


STATELESS: dict[str, Codec] = {"bf16": Bf16Codec(), "int8": Int8Codec()}


def check_codec(name: str) -> None:
    """Raise ``UsageError``, naming the known codecs, unless there is one of that name."""
    if name not in ARRAYS:
        known = ", ".join(ARRAYS)
        raise UsageError(f"`codec=` expects one of {known}; found '{name}'.{nearest(name, ARRAYS)}")


def codec_name(split: str, name: str) -> str:
    """Return the codec of a split: dev and test are always lossless, train takes the named one."""
    check_codec(name)
    return name if split == "train" else "bf16"
