"""`describe` and ``info`` on a cache that is finished, unfinished, damaged or missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, make_world
from support.digest_tables import blocks_of, publish_blocks, put_aside
from support.fixtures_extract import call_main

from embedcache.cache.cache import Cache
from embedcache.cache.calibration import load_calibration
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import Bf16Codec
from embedcache.cache.manifest.file_record import FileRecord, chunks_crc32c
from embedcache.cache.shards.shard import write_shard
from embedcache.cache.split_reader import SplitReader
from embedcache.errors import CacheError, UsageError
from embedcache.info import describe


def test_a_finished_cache(world: Any) -> None:
    found = describe(world.cache_path)
    cache = world.cache()
    assert found["kind"] == "cache"
    assert found["complete"] is True
    assert found["manifest"] == cache.manifest.hash
    for name, split in cache.manifest.splits.items():
        said = found["splits"][name]
        assert (said["tokens"], said["blocks"]) == (split.tokens, split.blocks)
        assert said["bytes_per_token"] == round(split.bytes / split.tokens, 1)
    files = [path for path in world.cache_path.rglob("*") if path.is_file()]
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    json.dumps(found)


def test_an_unfinished_cache_counts_its_committed_blocks(world: Any, tmp_path: Path) -> None:
    path = shutil.copytree(world.cache_path, tmp_path / "cache")
    (path / "manifest.json").unlink()
    next((path / "commits/train").iterdir()).unlink()
    found = describe(path)
    assert found["complete"] is False
    assert found["manifest"] is found["extracted"] is None
    assert found["arrays"] is found["bits_per_value"] is found["components"] is None
    train = found["splits"]["train"]
    assert train["committed_blocks"] == train["blocks"] - 1


def test_every_byte_belongs_to_an_array(tapped: World) -> None:
    found = describe(tapped.cache_path)
    total = sum(array["bytes"] for place in found["arrays"].values() for array in place.values())
    files = [path for path in tapped.cache_path.rglob("*") if path.is_file()]
    assert total == found["bytes"] == sum(path.stat().st_size for path in files)
    hidden, cache = found["base"]["hidden_size"], tapped.cache()
    for name, split in cache.manifest.splits.items():
        arrays = found["arrays"][name]
        folder = tapped.cache_path / name
        for tap in ("final", "layer_1"):
            under = (folder / "embeddings" / tap).rglob("*")
            size = sum(path.stat().st_size for path in under if path.is_file())
            said = arrays[f"embeddings/{tap}"]
            assert said["bytes"] == size
            assert said["bytes_per_token"] == round(size / split.tokens, 3)
            bits = found["bits_per_value"][name][tap]
            assert bits == pytest.approx(8 * size / split.tokens / hidden, abs=1e-3)
        markers = [p.stat().st_size for p in (tapped.cache_path / "commits" / name).iterdir()]
        assert arrays["markers"]["bytes"] == sum(markers)
    assert found["arrays"]["shared"].keys() >= {"head", "token_embedding", "manifest.json"}
    weight = tapped.cache_path / "base/head/weight/c/0/0"
    assert found["arrays"]["shared"]["head"]["bytes"] > weight.stat().st_size


def test_a_scale_belongs_to_its_tap(tmp_path: Path, session_home: None) -> None:
    found = describe(make_world(tmp_path / "world", codec="int8").cache_path)
    train, bits = found["arrays"]["train"], found["bits_per_value"]["train"]["final"]
    size = train["embeddings/final"]["bytes"] + train["scale/final"]["bytes"]
    assert bits == round(8 * size / found["splits"]["train"]["tokens"] / 32, 3)
    assert "scale/final" not in found["arrays"]["dev"]


def changed_copy(world: World, path: Path, change: Any) -> Path:
    """Copy a cache, changing the train embeddings of tap ``final`` and the manifest with them."""
    path = shutil.copytree(world.cache_path, path)
    rows = Cache(path).attributes.settings.block_tokens
    blocks = blocks_of(path, "train")
    for block, (records, sequences) in enumerate(blocks):
        name = f"train/embeddings/final/c/{block}/0"
        x_NH = Cache(path).split("train").block(block).x_NH["final"].float()
        values = torch.zeros(rows, x_NH.shape[1])
        values[: len(x_NH)] = change(x_NH)
        stored = Bf16Codec().encode(values, np.empty(0))["embeddings"].numpy()
        written = write_shard(path / name, stored, rows, CODERS["blosc"])
        record = FileRecord(
            path=name,
            bytes=written[0],
            sha256=written[1],
            crc32c=chunks_crc32c(path / name, 1),
        )
        blocks[block] = (tuple(record if old.path == name else old for old in records), sequences)
        publish_blocks(path, "train", blocks)
    return path


def test_dead_and_outlier_components_are_named(world: World, tmp_path: Path) -> None:
    clean = describe(world.cache_path)["components"]["final"]
    assert clean["count"] == 32
    assert (clean["dead"], clean["outliers"]) == ((), {})

    def change(x_NH: torch.Tensor) -> torch.Tensor:
        x_NH = x_NH.clone()
        x_NH[:, 3] = 0
        x_NH[:, 11] = 7.25  # constant: dead, too
        x_NH[:, 5] *= 100
        x_NH[:, 30] *= 30
        x_NH[:, 8] *= 6 * (x_NH.std(dim=0).median() / x_NH[:, 8].std())  # six times: no outlier
        return x_NH

    found = describe(changed_copy(world, tmp_path / "cache", change))["components"]["final"]
    assert found["dead"] == (3, 11)
    assert list(found["outliers"]) == [5, 30]
    cache = Cache(tmp_path / "cache").split("train")
    middle = cache.block((cache.manifest.blocks - 1) // 2)
    rows = [row for first, stop in middle.rows_S2.tolist() for row in range(first, stop)]
    std_H = middle.x_NH["final"][rows].double().numpy().std(axis=0)
    median = np.median(np.delete(std_H, [3, 11]))
    assert found["sampled_tokens"] == len(rows)
    assert found["outliers"][5] == pytest.approx(std_H[5] / median, rel=0.1)
    json.dumps(found)


def test_if_most_components_are_dead_the_others_are_no_outliers(
    world: World, tmp_path: Path
) -> None:
    def change(x_NH: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x_NH[:, :20]), x_NH[:, 20:]], dim=1)

    found = describe(changed_copy(world, tmp_path / "cache", change))["components"]["final"]
    assert found["dead"] == tuple(range(20))
    assert found["outliers"] == {}


def test_one_block_is_read_at_most(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = SplitReader.block
    monkeypatch.setattr(
        SplitReader, "block", lambda self, block, taps=None: read.append(block) or real(self, block)
    )
    describe(world.cache_path)
    assert len(read) == 1
    path = shutil.copytree(world.cache_path, tmp_path / "cache")
    first, stop = (int(v) for v in Cache(path).split("train").sequences(read[0])[0][[0, -1]])
    put_aside(path, "train", read[0], tuple(range(first, stop + 1)))
    assert describe(path)["components"]["final"]["sampled_tokens"] > 0
    assert len(read) == 2
    assert read[0] != read[1]


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing is there"):
        describe(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"holds neither"):
        describe(tmp_path)


@pytest.mark.parametrize("name", ["zarr.json", "train/zarr.json", "manifest.json"])
def test_a_damaged_cache_is_refused(world: Any, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(world.cache_path, tmp_path / "cache")
    (path / name).write_text("[]")
    with pytest.raises(CacheError, match=r"damaged"):
        describe(path)


@pytest.mark.parametrize("complete", [True, False])
def test_the_command_prints_a_table_or_json(
    world: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    complete: bool,
) -> None:
    path = shutil.copytree(world.cache_path, tmp_path / "cache")
    if not complete:
        (path / "manifest.json").unlink()
    assert call_main(monkeypatch, "info", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"] is complete
    assert call_main(monkeypatch, "info", str(path)) == 0
    printed = capsys.readouterr().out
    assert ("yes" if complete else "again to resume") in printed
    assert "LlamaForCausalLM, 3 layers" in printed
    assert ("embeddings/final" in printed) == ("components, final" in printed) == complete
    assert call_main(monkeypatch, "info", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("embedcache: expected a cache")


def test_the_calibration_of_the_codec_is_described(tmp_path: Path, capsys, monkeypatch) -> None:
    world = make_world(tmp_path, codec="transform")
    found = describe(world.cache_path)["calibration"]["final"]
    calibration = load_calibration(world.cache_path, "final")
    assert found == {"step": calibration.step, **calibration.measured}
    assert found["bits"] == pytest.approx(1.5, abs=0.3)
    assert call_main(monkeypatch, "info", str(world.cache_path)) == 0
    printed = capsys.readouterr().out
    assert "calibration, final" in printed
    assert f" {found['bits']:.2f} bits per value on held-out tokens" in printed
    assert describe(make_world(tmp_path / "b").cache_path)["calibration"] is None
