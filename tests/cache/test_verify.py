"""``verify`` names every damaged file, and no reader serves one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cache_faults import harm, names_in, served
from support.digest_tables import blocks_of, publish_blocks, put_aside
from support.fixtures_extract import corpus_config, flip_byte, small_settings, write_documents

from embedcache.cache.blocks.commit import BlockWriter, Marker
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.integers import ARRAYS, ArraySpec
from embedcache.cache.format.layout import MANIFEST, SCHEMA, TOKENS_DIGESTS, marker_path
from embedcache.cache.manifest import digest_table, file_record
from embedcache.cache.manifest.digests import publish_digests
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.cache.verify import Fault, verify
from embedcache.errors import CacheError, EmbedcacheError
from embedcache.extraction.extract import extract
from embedcache.store.files import hash_file

SHARD = "train/embeddings/final/c/1/0"


@pytest.fixture(scope="session")
def undamaged(caches: dict[str, Path]) -> dict[str, bytes]:
    return served(caches["int8"])


def faults_of(cache: Path, *, deep: bool = False) -> list[str]:
    return [str(fault) for fault in verify(cache, deep=deep).faults]


@pytest.mark.parametrize("deep", [False, True])
def test_an_undamaged_cache_has_no_fault(caches: dict[str, Path], codec: str, deep: bool) -> None:
    found = verify(caches[codec], deep=deep)
    assert found.faults == ()
    assert found.complete
    assert found.committed == found.blocks > 5
    files = [name for name in names_in(caches[codec]) if not name.startswith("commits/")]
    assert found.files == len(files) - 2  # without manifest.json and tokens.json


@pytest.mark.parametrize(
    "seed",
    [
        *range(30),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 300)),
    ],
)
def test_a_random_fault_is_reported_and_never_served(
    copied: Path, undamaged: dict[str, bytes], seed: int
) -> None:
    damage = harm(copied, seed)
    found = verify(copied, deep=True)
    assert {fault.file for fault in found.faults} & set(damage.files), (damage, found.faults)
    assert len(found.faults) <= 3, found.faults
    try:
        read = served(copied)
    except EmbedcacheError:
        return
    assert read == undamaged, damage


@pytest.mark.parametrize("deep", [False, True])
def test_a_fault_names_the_block_the_file_and_the_reason(copied: Path, deep: bool) -> None:
    flip_byte(copied / SHARD)
    expected = [f"train block 1: {SHARD} fails its SHA-256"] if deep else []
    assert faults_of(copied, deep=deep) == expected


def edit_json(path: Path, *keys: Any, value: Any) -> None:
    whole = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(json.dumps(whole, indent=2))


FINAL = ("train/embeddings/final/zarr.json",)


@pytest.mark.parametrize(
    ("name", "keys", "value", "why"),
    [
        ("zarr.json", ("attributes", "embedcache", "settings", "codec"), "bf16", "settings.codec"),
        ("dev/zarr.json", ("attributes", "embedcache", "tokens"), 1, "embedcache.tokens"),
        (*FINAL, ("codecs",), [], "was edited (codecs)"),
        (*FINAL, ("fill_value",), 1, "was edited (fill_value)"),
        (*FINAL, ("shape",), [256, 32], "was edited (shape)"),
        (*FINAL, ("data_type",), "uint8", "was edited (data_type)"),
        ("base/head/zarr.json", ("attributes", "scale"), 2.0, "attributes.scale"),
        (MANIFEST, ("extracted", "seconds"), 1e9, "does not match its own SHA-256"),
        (MANIFEST, ("splits", "dev", "tokens"), 1, "does not match its own hash"),
        (
            TOKENS_DIGESTS,
            ("digest_tables", "digests/train/tokens", "rows"),
            1,
            "does not match its own SHA-256",
        ),
        ("commits/dev/00000000.0.json", ("quarantined",), [0], "does not match its own SHA-256"),
    ],
)
def test_edits_are_found_without_reading_embeddings(
    copied: Path, name: str, keys: tuple[Any, ...], value: Any, why: str
) -> None:
    edit_json(copied / name, *keys, value=value)
    (line,) = faults_of(copied)
    assert name in line
    assert why in line


def noise(seed: int) -> dict[str, tuple[ArraySpec, np.ndarray[Any, Any]]]:
    """Return a train block that does not compress: all such shards have one size."""
    draw = np.random.default_rng(seed)
    arrays = {}
    for tap in ("final", "layer_1"):
        for spec in ARRAYS["int8"]:
            columns = (32,) if spec.wide else ()
            dtype = np.dtype(spec.dtype)
            values = np.frombuffer(draw.bytes(256 * dtype.itemsize * (32 if columns else 1)), dtype)
            arrays[f"{spec.group}/{tap}"] = (spec, values.reshape(256, *columns))
    return arrays


def test_exchanged_shards_of_one_size_are_found_and_not_read(copied: Path) -> None:
    """Every size and every checksum inside the files match."""
    writer = BlockWriter(copied)
    blocks = [writer.commit("train", block, noise(block), generation=1) for block in (0, 1)]
    writer.close()
    recorded = blocks_of(copied, "train")
    publish_blocks(copied, "train", [*((m.files, ()) for m in blocks), *recorded[2:]])
    assert faults_of(copied, deep=True) == []
    first, second = copied / SHARD, copied / "train/embeddings/final/c/0/0"
    one, other = first.read_bytes(), second.read_bytes()
    assert len(one) == len(other)
    first.write_bytes(other)
    second.write_bytes(one)
    assert [fault.block for fault in verify(copied).faults] == [0, 1]
    with pytest.raises(CacheError, match=rf"{second} holds other chunks.*`embedcache\.repair\(\)`"):
        served(copied)


def test_a_marker_of_other_files_is_found(copied: Path) -> None:
    path = marker_path(copied, "train", 0)
    marker = Marker.read(path)
    writer = BlockWriter(copied)
    writer.renew("train", 0, marker.files[1:], quarantined=(), generation=1)
    writer.renew(
        "dev", 0, Marker.read(marker_path(copied, "dev", 0)).files, quarantined=(2,), generation=3
    )
    writer.close()
    assert faults_of(copied) == [
        "train block 0: commits/train/00000000.1.json does not name the files that manifest.json "
        "names",
        "dev block 0: commits/dev/00000000.3.json quarantines sequences that manifest.json does "
        "not",
    ]


def test_a_manifest_that_disagrees_with_tokens_json_or_markers_is_found(copied: Path) -> None:
    """Each matches its own hash."""
    digests = read_manifest(copied).tokens
    put_aside(copied, "train", 0, (1,))
    publish_digests(copied, replace(digests, metadata=digests.metadata | {"zarr.json": "{}"}))
    assert faults_of(copied) == [
        "tokens.json does not name the files that manifest.json names",
        "manifest.json quarantines 'train' sequences that no marker does",
    ]


def test_a_file_that_the_disk_cannot_read_is_named(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> str:
        if path == copied / SHARD or "dev/tokens/ids/c" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return hash_file(path)

    monkeypatch.setattr(file_record, "hash_file", failing)
    first, *_, last = faults_of(copied, deep=True)
    assert first == "dev/tokens/ids/c/0 cannot be read (Input/output error)"
    assert last == f"train block 1: {SHARD} cannot be read (Input/output error)"


def test_a_newer_schema_is_refused(copied: Path) -> None:
    (copied / MANIFEST).write_text("unknown")
    (copied / TOKENS_DIGESTS).write_text("unknown")
    edit_json(copied / "zarr.json", "attributes", "embedcache", "schema", value=SCHEMA + 1)
    with pytest.raises(CacheError, match=r"pip install --upgrade"):
        verify(copied)


def test_a_moved_marker_is_found(copied: Path) -> None:
    shutil.copy(marker_path(copied, "train", 1), marker_path(copied, "train", 0))
    shutil.copy(marker_path(copied, "train", 1), marker_path(copied, "train", 99))
    first, second = faults_of(copied)
    assert first == (
        "train block 0: commits/train/00000000.0.json is the marker of train block 1, moved"
    )
    assert "00000099.0.json belongs to no block" in second


def test_a_shard_that_does_not_decode_is_found_though_its_hash_matches(copied: Path) -> None:
    """A faulty writer recorded it as it is, but it is no shard of this array."""
    (copied / MANIFEST).unlink()
    writer = BlockWriter(copied)
    arrays = {
        name: (spec, values[:, :8] if spec.wide else values)
        for name, (spec, values) in noise(0).items()
    }
    writer.commit("train", 0, arrays, generation=1)
    writer.close()
    lines = [line for line in faults_of(copied, deep=True) if "train block 0" in line]
    assert len(lines) == 2
    assert all("does not decode" in line for line in lines)


def test_the_committed_blocks_of_an_unfinished_cache_are_verified(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    marker_path(copied, "train", 0).unlink()
    found = verify(copied, deep=True)
    assert not found.complete
    assert found.committed == found.blocks - 1
    assert found.faults == ()
    flip_byte(copied / SHARD)
    flip_byte(copied / "train/tokens/ids/c/0")
    assert faults_of(copied, deep=True) == [
        "train/tokens/ids/c/0 fails its SHA-256",
        f"train block 1: {SHARD} fails its SHA-256",
    ]


def test_a_committed_block_in_staging_is_no_fault(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    marker_path(copied, "train", 0).unlink()
    marker = Marker.read(marker_path(copied, "train", 1))
    staged = copied / ".staging" / marker.attempt / SHARD
    staged.parent.mkdir(parents=True)
    (copied / SHARD).rename(staged)
    assert faults_of(copied, deep=True) == []
    staged.unlink()
    assert faults_of(copied) == [f"train block 1: {SHARD} is missing"]


def test_a_lost_manifest_is_a_fault(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    (line,) = faults_of(copied)
    assert line.startswith("manifest.json is missing, and all ")


def test_without_manifest_and_tokens_json_only_these_are_faults(copied: Path) -> None:
    os.truncate(copied / MANIFEST, 100)
    (copied / TOKENS_DIGESTS).unlink()
    faults = verify(copied).faults
    assert [fault.file for fault in faults] == [MANIFEST, TOKENS_DIGESTS]
    assert isinstance(faults[0], Fault)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no such cache"):
        verify(tmp_path / "absent")
    with pytest.raises(CacheError, match=r"not an embedcache cache"):
        verify(tmp_path)


def test_a_damaged_page_of_a_digest_table_affects_only_its_blocks(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of three records, one a block."""
    monkeypatch.setattr(digest_table, "PAGE", 3)
    path = tmp_path / "cache"
    extract(
        corpus_config(write_documents(tmp_path / "corpus", 20)),
        base=str(tiny_base),
        out=path,
        settings=small_settings(),
        device="cpu",
    )
    assert faults_of(path, deep=True) == []
    before = served(path)
    data = bytearray((path / "digests/train/embeddings").read_bytes())
    data[4 * 44] ^= 1
    (path / "digests/train/embeddings").write_bytes(data)
    assert faults_of(path, deep=True) == ["digests/train/embeddings fails the SHA-256 of page 1"]
    flip_byte(path / "train/embeddings/final/c/1/0")
    flip_byte(path / "train/embeddings/final/c/4/0")  # its marker has its record, too
    assert [line.split(":")[0] for line in faults_of(path, deep=True)] == [
        "digests/train/embeddings fails the SHA-256 of page 1",
        "train block 1",
        "train block 4",
    ]
    reader = Cache(path).split("train")
    assert before["train/0/ids_N"] == reader.block(0).ids_N.tobytes()
    for block in (1, 3, 4):
        with pytest.raises(CacheError, match=r"chunk 0 fails|the SHA-256 of page 1"):
            reader.block(block)
