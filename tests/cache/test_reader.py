"""A reader refuses a cache that is unfinished or damaged; nothing damaged is read as zeros."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.fixtures_extract import flip_byte

from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import ATTRIBUTE, MANIFEST, SCHEMA
from embedcache.cache.shards.errors import REPAIR_HINT
from embedcache.errors import CacheError

SHARDS = (
    "train/embeddings/final/c/0/0",
    "train/embeddings/layer_1/c/1/0",
    "train/scale/final/c/0",
    "dev/embeddings/final/c/0/0",
)
TOKENS = (
    "train/tokens/ids/c/0",
    "train/tokens/loss_mask/c/1",
    "train/tokens/offsets/c/0/0",
    "train/tokens/document/c/0",
    "train/tokens/blocks/c/0",
    "train/documents/name_bytes/c/0",
    "train/documents/name_offsets/c/0",
    "base/head/weight/c/0/0",
)
METADATA = (
    "zarr.json",
    "train/zarr.json",
    "train/tokens/ids/zarr.json",
    "train/tokens/blocks/zarr.json",
    "base/head/zarr.json",
    "base/head/weight/zarr.json",
)


def read_all(path: Path) -> None:
    """Read everything that a trainer, an evaluator or ``info`` would."""
    cache = Cache(path)
    for name in ("train", "dev", "test"):
        split = cache.split(name)
        assert split.documents
        for block in range(split.manifest.blocks):
            split.block(block)
    assert cache.base_array("head/weight") is not None
    cache.head_settings()


def test_a_whole_cache_is_read_and_described(copied: Path) -> None:
    read_all(copied)
    cache = Cache(str(copied))
    assert cache.path == copied
    tokens = {name: cache.split(name).manifest.tokens for name in ("train", "dev", "test")}
    assert repr(cache) == (
        f"Cache({str(copied)!r}, tokens={tokens}, codec='int8', taps=('final', 'layer_1'))"
    )
    blocks = cache.split("dev").manifest.blocks
    assert (
        repr(cache.split("dev")) == f"SplitReader('dev', blocks={blocks}, tokens={tokens['dev']})"
    )


@pytest.mark.parametrize("name", SHARDS + TOKENS)
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_refused_by_name(copied: Path, name: str, harm: str) -> None:
    path = copied / name
    match harm:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, path.stat().st_size // 2)
        case "flipped":
            flip_byte(path)
    with pytest.raises(CacheError) as refused:
        read_all(copied)
    found = str(refused.value)
    assert found.endswith(REPAIR_HINT)
    assert str(path.parent.parent if harm == "flipped" else path).rstrip("/c") in found


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"zarr_format": 3, "node_type": "array"}'])
def test_garbage_for_metadata_is_refused(copied: Path, name: str, text: str) -> None:
    (copied / name).write_text(text)
    with pytest.raises(CacheError):
        read_all(copied)


@pytest.mark.parametrize("name", METADATA)
def test_missing_metadata_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CacheError):
        read_all(copied)


def test_a_cache_without_manifest_is_not_complete(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(CacheError, match=r"not complete.*`embedcache\.extract\(\)` again"):
        Cache(copied)


def edit_json(path: Path, *keys: Any, value: Any) -> None:
    whole = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("splits", "train", "tokens"), 1),
        (("splits", "train", "quarantined", "rows"), 1),
        (("splits", "train", "embeddings", "sha256"), "0" * 64),
        (("tokens", "digest_tables", "digests/train/tokens", "rows"), 1),
        (("tokens", "metadata", "zarr.json"), "{}"),
        (("base", "files"), []),
        (("hash",), "0" * 64),
    ],
)
def test_an_edited_manifest_is_refused(copied: Path, keys: tuple[Any, ...], value: Any) -> None:
    edit_json(copied / MANIFEST, *keys, value=value)
    with pytest.raises(CacheError, match=r"does not match its own hash"):
        Cache(copied)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "3", '{"splits": [], "hash": "", "extracted": {}}']
)
def test_a_damaged_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match=r"is damaged"):
        Cache(copied)


def test_measurements_of_the_run_are_no_part_of_the_hash(copied: Path) -> None:
    before = Cache(copied).manifest.hash
    edit_json(copied / MANIFEST, "extracted", "seconds", value=1e9)
    assert Cache(copied).manifest.hash == before


def test_a_newer_schema_is_refused(copied: Path) -> None:
    edit_json(copied / "zarr.json", "attributes", ATTRIBUTE, "schema", value=SCHEMA + 1)
    with pytest.raises(CacheError, match=f"schema {SCHEMA + 1}.*pip install --upgrade"):
        Cache(copied)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("settings",), {}),
        (("settings",), 3),
        (("settings", "codec"), "int9"),
        (("settings", "surprise"), 1),
        ((), 3),
    ],
)
def test_edited_attributes_are_refused(copied: Path, keys: tuple[str, ...], value: Any) -> None:
    edit_json(copied / "zarr.json", "attributes", ATTRIBUTE, *keys, value=value)
    with pytest.raises(CacheError, match=r"zarr\.json"):
        Cache(copied)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no such cache.*`embedcache\.extract\(\)`"):
        Cache(tmp_path / "absent")
    with pytest.raises(CacheError, match=r"not an embedcache cache"):
        Cache(tmp_path)


def test_the_error_for_a_missing_tap_names_the_nearest(copied: Path) -> None:
    with pytest.raises(CacheError, match=r"no tap 'layer_2'.*Did you mean 'layer_1'"):
        Cache(copied).require_taps(("final", "layer_2"))


def test_the_error_for_a_missing_split_names_the_others(copied: Path) -> None:
    with pytest.raises(CacheError, match=r"no 'exam' split .*train, dev, test"):
        Cache(copied).split("exam")
