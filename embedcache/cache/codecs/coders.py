"""How a chunk of integers becomes bytes: blosc for plain arrays, pcodec for coefficients.

Each coder writes exactly what the Zarr codecs named in an array's metadata write, so that a chunk
is the same whoever wrote it.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
from numcodecs.blosc import Blosc
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone
from zarr.codecs import BloscCodec

Array = np.ndarray[Any, Any]

COMPRESSOR: Final = "zstd"
LEVEL = 1
BLOSC_BLOCK = 1 << 20
"""zstd at its fastest on large blocks: measured on bfloat16 embeddings, 11.0 bits a value read at
1.9 GB/s a core, where level 3 on blosc's own blocks takes 11.9 bits and gives 0.9 GB/s."""

COMPONENTS = 8
"""Neighbouring components that share one stream: one alone costs more in its header (measured at
1.5 bits and 16,384 rows: 1.531 alone, 1.513 by eight)."""

PCO_LEVEL = 8


class Coder(Protocol):
    """Turns one chunk of rows into bytes and back, the interpreter's lock free while it works."""

    def encode(self, chunk: Array) -> bytes:
        """Return the bytes of a chunk [rows, ...]."""
        ...

    def decode(self, data: bytes | memoryview, out: Array) -> None:
        """Decode into ``out`` [rows, ...]; raises ``ValueError`` or ``RuntimeError`` if damaged."""
        ...

    def zarr_codecs(self, itemsize: int) -> dict[str, Any]:
        """Return what makes zarr write the same: arguments of ``create_array``."""
        ...


class BloscCoder(Coder):
    """Byte shuffle and zstd: standard Zarr, read by any implementation."""

    def __init__(self) -> None:
        self._blosc = Blosc(
            cname=COMPRESSOR, clevel=LEVEL, shuffle=Blosc.SHUFFLE, blocksize=BLOSC_BLOCK
        )

    def encode(self, chunk: Array) -> bytes:
        """Compress the chunk's bytes."""
        return bytes(self._blosc.encode(np.ascontiguousarray(chunk)))

    def decode(self, data: bytes | memoryview, out: Array) -> None:
        """Decompress into ``out``."""
        holds = int.from_bytes(data[4:8], "little")  # blosc's header; a shorter chunk decodes
        if holds != out.nbytes:
            raise ValueError(f"it holds {holds} bytes, expected {out.nbytes}")
        self._blosc.decode(data, out=out)

    def zarr_codecs(self, itemsize: int) -> dict[str, Any]:
        """Return blosc as a compressor."""
        codec = BloscCodec(
            cname=COMPRESSOR,
            clevel=LEVEL,
            shuffle="shuffle",
            blocksize=BLOSC_BLOCK,
            typesize=itemsize,
        )
        return {"compressors": [codec]}


class PcoCoder(Coder):
    """Integers by component, entropy-coded by pcodec close to their entropy.

    Bytes: uint32 little endian, the number of rows without the zeros at the end, then one length
    a stream; then the streams, each of ``COMPONENTS`` neighbouring columns, column after column, in
    pcodec's standalone format. A stream of zeros alone has length 0. Chunks are int16
    [rows, columns].
    """

    def __init__(self) -> None:
        self._config = ChunkConfig(
            compression_level=PCO_LEVEL,
            mode_spec=ModeSpec.classic(),
            delta_spec=DeltaSpec.no_op(),
        )

    def encode(self, chunk: Array) -> bytes:
        """Entropy-code the chunk."""
        used = np.flatnonzero(chunk.any(axis=1))
        rows = int(used[-1]) + 1 if len(used) else 0
        columns = np.ascontiguousarray(chunk[:rows].T)
        streams = []
        for start in range(0, len(columns), COMPONENTS):
            values = columns[start : start + COMPONENTS].reshape(-1)
            data = standalone.simple_compress(values, self._config) if values.any() else b""
            streams.append(data)
        numbers = np.array([rows, *map(len, streams)], "<u4")
        return b"".join([numbers.tobytes(), *streams])

    def decode(self, data: bytes | memoryview, out: Array) -> None:
        """Decode into ``out``, int16 [rows, columns]."""
        width = out.shape[1]
        count = 1 + -(-width // COMPONENTS)
        if len(data) < 4 * count:
            raise ValueError(f"{len(data)} bytes cannot hold the {count} numbers they start with")
        rows, *lengths = np.frombuffer(data, "<u4", count).tolist()
        ends = 4 * count + np.cumsum(lengths, dtype=np.int64)
        if rows > len(out) or len(data) != ends[-1]:
            raise ValueError(
                f"{len(data)} bytes of {rows} rows, expected {ends[-1]} of at most {len(out)}"
            )
        columns = np.empty((width, rows), np.int16)
        view, start = memoryview(data), 4 * count
        for number, end in enumerate(ends.tolist()):
            values = columns[number * COMPONENTS : (number + 1) * COMPONENTS].reshape(-1)
            if start == end:
                values[:] = 0
            else:
                done = standalone.simple_decompress_into(bytes(view[start:end]), values)
                if done.n_processed != values.size or not done.finished:
                    raise ValueError(f"stream {number} holds {done.n_processed} values")
            start = end
        torch_transpose(columns, out[:rows])
        out[rows:] = 0

    def zarr_codecs(self, itemsize: int) -> dict[str, Any]:
        """Return the Zarr codec of this format as a serializer."""
        from embedcache.cache.codecs.zarr_pco import PcoCodec

        return {"serializer": PcoCodec(), "compressors": []}


def torch_transpose(columns: Array, out: Array) -> None:
    """Copy ``columns`` [width, rows] into ``out`` [rows, width]; by torch, in blocks: 3 × numpy."""
    import torch

    torch.from_numpy(out).copy_(torch.from_numpy(columns).t())


CODERS: dict[str, Coder] = {"blosc": BloscCoder(), "pco": PcoCoder()}
