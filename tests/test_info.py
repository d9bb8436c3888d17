"""What ``info`` says of a cache: finished, begun, damaged, or none at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures_extract import call_main

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


def test_a_cache_that_was_begun_counts_its_blocks(world: Any, tmp_path: Path) -> None:
    path = shutil.copytree(world.cache_path, tmp_path / "cache")
    (path / "manifest.json").unlink()
    next((path / "commits/train").iterdir()).unlink()
    found = describe(path)
    assert found["complete"] is False
    assert found["manifest"] is found["extracted"] is None
    train = found["splits"]["train"]
    assert train["committed_blocks"] == train["blocks"] - 1


def test_what_is_neither_says_so(tmp_path: Path) -> None:
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
    assert ("yes" if complete else "run the same extract again") in printed
    assert "LlamaForCausalLM, 3 layers" in printed
    assert call_main(monkeypatch, "info", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("embedcache: expected a cache")
