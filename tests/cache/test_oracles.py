"""zarr-python and tensorstore read the integers that our reader reads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from embedcache.cache.cache import Cache
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS, codec_name
from embedcache.cache.format.arrays import chunk_rows, zarr_codecs
from embedcache.cache.format.layout import shard_name
from embedcache.cache.manifest.file_record import record_file
from embedcache.cache.shards.shard import read_shard, write_shard
from embedcache.errors import CacheError

DTYPES = {
    "bf16": {"embeddings": "uint16"},
    "int8": {"embeddings": "int8", "scale": "float32"},
    "transform": {"embeddings": "int16"},
}


def by_tensorstore(path: Path) -> np.ndarray[Any, Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True, open=True).result().read().result()


def test_block_bytes_are_those_of_a_block_in_memory(caches: dict[str, Path], codec: str) -> None:
    reader = Cache(caches[codec]).split("train")
    stored = reader.stored(0, reader.taps)
    arrays = [values for tap in stored.arrays.values() for values in tap.values()]
    held = sum(values.nbytes for values in (stored.ids_N, stored.loss_mask_N, *arrays))
    assert held * 256 == reader.block_bytes(reader.taps) * len(stored.ids_N)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_zarr_and_tensorstore_read_our_integers(
    caches: dict[str, Path], codec: str, split: str
) -> None:
    path = caches[codec]
    reader = Cache(path).split(split)
    group = zarr.open(path, mode="r")
    used = codec_name(split, codec)
    specs = ARRAYS[used]
    assert ("scale" in group[split]) == (split == "train" and codec == "int8")
    for tap in reader.taps:
        whole = {spec.group: group[f"{split}/{spec.group}/{tap}"][:] for spec in specs}
        for spec in specs:
            values = whole[spec.group]
            assert values.dtype == spec.dtype == DTYPES[used][spec.group]
            if used != "transform":  # tensorstore cannot be given its codec
                assert np.array_equal(by_tensorstore(path / split / spec.group / tap), values)
        for number in range(reader.manifest.blocks):
            block = reader.block(number)
            rows = slice(number * 256, number * 256 + len(block.ids_N))
            for spec in specs:
                ours = read_shard(
                    path / shard_name(f"{split}/{spec.group}/{tap}", number, 1 + spec.wide),
                    rows=len(block.ids_N),
                    columns=(32,) if spec.wide else (),
                    dtype=spec.dtype,
                    chunk_rows=chunk_rows(spec, 256),
                    chunks=1,
                    coder=CODERS[spec.coder],
                )
                assert np.array_equal(ours, whole[spec.group][rows])
            stored = {name: torch.from_numpy(values[rows]) for name, values in whole.items()}
            decoded = reader.codecs[tap].decode(stored, block.ids_N)
            assert decoded.equal(block.x_NH[tap])
            assert block.x_NH[tap].abs().sum() > 0
    for name in ("ids", "loss_mask", "span", "offsets", "document", "blocks"):
        array = path / split / "tokens" / name
        assert np.array_equal(by_tensorstore(array), group[f"{split}/tokens/{name}"][:])


@pytest.mark.parametrize(
    ("coder", "dtype", "columns"),
    [("blosc", dtype, columns) for dtype in ("uint16", "int8", "float32") for columns in ((), (7,))]
    + [("pco", "int16", (7,)), ("pco", "int16", (21,))],
)
def test_zarr_reads_a_shard_of_several_chunks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coder: str,
    dtype: str,
    columns: tuple[int, ...],
) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (96, *columns)).astype(dtype)
    values[32:64] = 0  # a chunk of nothing but the fill value is stored like any other
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        shards=(48, *columns),
        chunks=(16, *columns),
        dtype=dtype,
        **zarr_codecs(coder, np.dtype(dtype).itemsize),
    )
    for shard in range(2):
        name = shard_name("a", shard, values.ndim)
        size, _ = write_shard(
            tmp_path / name, values[shard * 48 : shard * 48 + 48], 16, CODERS[coder]
        )
        assert (tmp_path / name).stat().st_size == size
    assert np.array_equal(array[:], values)
    if coder == "blosc":
        assert np.array_equal(by_tensorstore(tmp_path / "a"), values)
    place = tmp_path / shard_name("a", 1, values.ndim)
    settings: dict[str, Any] = {"columns": columns, "dtype": dtype, "chunk_rows": 16, "chunks": 3}
    settings["coder"] = CODERS[coder]
    assert np.array_equal(read_shard(place, rows=20, **settings), values[48:68])
    record, other = (
        record_file(tmp_path / name, name, chunks=3)
        for name in (shard_name("a", number, values.ndim) for number in (1, 0))
    )
    for rows in (20, 48):  # the checksums of chunks that are not needed are compared, too
        found = read_shard(place, rows=rows, record=record, **settings)
        assert np.array_equal(found, values[48 : 48 + rows])
        with pytest.raises(CacheError, match="holds other chunks than were written there"):
            same_size = replace(other, bytes=record.bytes)
            read_shard(place, rows=rows, record=same_size, **settings)
        with pytest.raises(CacheError, match=f"has {record.bytes} bytes, expected 7"):
            read_shard(place, rows=rows, record=replace(record, bytes=7), **settings)
    with monkeypatch.context() as patch:  # a read may return fewer bytes
        pread = os.pread
        patch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 5), at))
        assert np.array_equal(read_shard(place, rows=48, **settings), values[48:])
    with pytest.raises(CacheError, match="is missing"):
        read_shard(tmp_path / "none", rows=48, **settings)
    data = place.read_bytes()
    for position in range(0, len(data), 11):  # a flipped bit anywhere, the index included
        place.write_bytes(data[:position] + bytes([data[position] ^ 8]) + data[position + 1 :])
        with pytest.raises(CacheError, match="damaged"):
            read_shard(place, rows=48, **settings)
    place.write_bytes(data[:10])
    with pytest.raises(CacheError, match="outside its 10 bytes"):
        read_shard(place, rows=48, **settings)


def test_coefficients_of_another_shape_are_refused() -> None:
    """The checksum of such a chunk matches, but not its content."""
    values = np.arange(60, dtype=np.int16).reshape(6, 10)
    data, out = CODERS["pco"].encode(values), np.empty((6, 10), np.int16)
    CODERS["pco"].decode(data, out)
    assert np.array_equal(out, values)
    for wrong in (data[:3], data[:-1], data + b"x", b"\x07" + data[1:], b"\x05" + data[1:]):
        with pytest.raises((ValueError, RuntimeError)):
            CODERS["pco"].decode(wrong, out)
    with pytest.raises((ValueError, RuntimeError)):
        CODERS["pco"].decode(data, np.empty((5, 10), np.int16))
    with pytest.raises((ValueError, RuntimeError)):
        CODERS["pco"].decode(data, np.empty((6, 17), np.int16))
