"""How embeddings become the integers that Zarr stores, and back.

Both codecs use standard Zarr v3 codecs only (blosc with byte shuffle and zstd, then crc32c, inside
shards), so any Zarr implementation reads the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from embedcache.cache.shard import COMPRESSOR, LEVEL
from embedcache.errors import UsageError, nearest

CHUNK_ROWS = 2048
"""Rows of an inner chunk: the unit that is compressed and checksummed."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a codec: its group under the split, dtype, and whether it has hidden columns."""

    group: str
    dtype: str
    wide: bool


class Codec(Protocol):
    """Turns x_NH into named integer arrays and back."""

    name: str
    arrays: tuple[ArraySpec, ...]

    def encode(self, x_NH: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Return one array per spec, by group name; rows as in x_NH (float32 or bfloat16, CPU)."""
        ...

    def decode(self, arrays: dict[str, np.ndarray[Any, Any]]) -> torch.Tensor:
        """Return x_NH, bfloat16, from the arrays that ``encode`` made."""
        ...

    def bits(self) -> float:
        """Return an upper estimate of stored bits a value, for the preflight."""
        ...


class Bf16Codec(Codec):
    """The bit patterns of bfloat16: lossless for a base that computes in bfloat16."""

    name = "bf16"
    arrays = (ArraySpec("embeddings", "uint16", True),)

    def encode(self, x_NH: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Round to bfloat16 (to nearest even) and keep the bits."""
        bits_NH = x_NH.to(torch.bfloat16).contiguous().view(torch.uint16)
        return {"embeddings": bits_NH.numpy()}

    def decode(self, arrays: dict[str, np.ndarray[Any, Any]]) -> torch.Tensor:
        """View the bits as bfloat16, without a copy."""
        return torch.from_numpy(arrays["embeddings"]).view(torch.bfloat16)

    def bits(self) -> float:
        """Bits a value after blosc: real embeddings take 11.3 to 12.6."""
        return 12.6


class Int8Codec(Codec):
    """Symmetric int8 with one float32 scale a token: q = round(x / scale), |q| <= 127."""

    name = "int8"
    arrays = (ArraySpec("embeddings", "int8", True), ArraySpec("scale", "float32", False))

    def encode(self, x_NH: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Scale each token by its largest magnitude; a token of zeros keeps scale 1."""
        x_NH = x_NH.float()
        scale_N = x_NH.abs().amax(dim=1) / 127
        scale_N[scale_N == 0] = 1.0
        q_NH = (x_NH / scale_N[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"embeddings": q_NH.numpy(), "scale": scale_N.numpy()}

    def decode(self, arrays: dict[str, np.ndarray[Any, Any]]) -> torch.Tensor:
        """Return scale * q in bfloat16."""
        q_NH = torch.from_numpy(arrays["embeddings"]).float()
        return (q_NH * torch.from_numpy(arrays["scale"])[:, None]).to(torch.bfloat16)

    def bits(self) -> float:
        """Bits a value: eight at most, scales are a rounding error."""
        return 8.0


CODECS: dict[str, Codec] = {"bf16": Bf16Codec(), "int8": Int8Codec()}


def codec_named(name: str) -> Codec:
    """Return the codec of that name; raises ``UsageError`` naming the known ones."""
    if name not in CODECS:
        known = ", ".join(CODECS)
        raise UsageError(f"no codec '{name}': expected one of {known}.{nearest(name, CODECS)}")
    return CODECS[name]


def codec_for(split: str, name: str) -> Codec:
    """Return a split's codec: dev and test are always lossless, train takes the named one."""
    return codec_named(name if split == "train" else "bf16")


def create_arrays(
    group: zarr.Group, tap: str, codec: Codec, *, blocks: int, block_tokens: int, hidden: int
) -> None:
    """Create the empty arrays of one tap in a split's group: one shard a block."""
    rows = chunk_rows(block_tokens)
    for spec in codec.arrays:
        columns = (hidden,) if spec.wide else ()
        group.create_array(
            f"{spec.group}/{tap}",
            shape=(blocks * block_tokens, *columns),
            shards=(block_tokens, *columns),
            chunks=(rows, *columns),
            dtype=spec.dtype,
            compressors=compressors(np.dtype(spec.dtype).itemsize),
            fill_value=0,
        )


def chunk_rows(block_tokens: int) -> int:
    """Return the rows of an inner chunk in blocks of that size."""
    return CHUNK_ROWS if block_tokens % CHUNK_ROWS == 0 else block_tokens


def compressors(itemsize: int) -> list[Any]:
    """Return the byte codecs of every array: blosc (byte shuffle, zstd), then crc32c."""
    return [
        BloscCodec(cname=COMPRESSOR, clevel=LEVEL, shuffle="shuffle", typesize=itemsize),
        Crc32cCodec(),
    ]
