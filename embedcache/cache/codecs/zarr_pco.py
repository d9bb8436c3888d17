"""`PcoCoder` as a Zarr v3 codec, so that plain ``zarr.open`` reads a cache's coefficients.

Registered by the entry point ``embedcache.pco`` of the group ``zarr.codecs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from embedcache.cache.codecs.coders import CODERS

NAME = "embedcache.pco"


@dataclass(frozen=True)
class PcoCodec(ArrayBytesCodec):
    """Chunks of int16 [rows, columns] to the bytes of `embedcache.cache.codecs.coders.PcoCoder`."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the codec that an array's metadata names; it has no settings."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as an array's metadata names it."""
        return {"name": NAME, "configuration": {}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise: the size depends on the values."""
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(chunk_spec.shape, np.int16)
        CODERS["pco"].decode(chunk_bytes.to_bytes(), out)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        data = CODERS["pco"].encode(np.asarray(chunk_array.as_numpy_array()))
        return chunk_spec.prototype.buffer.from_bytes(data)
