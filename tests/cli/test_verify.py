"""``embedcache verify`` and ``embedcache extract --repair``: output and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.fixtures_extract import call_main, flip_byte

SHARD = "train/embeddings/final/c/1/0"


@pytest.fixture
def cache(world: Any, tmp_path: Path) -> Path:
    return shutil.copytree(world.cache_path, tmp_path / "cache")


def flags(world: Any, cache: Path) -> list[str]:
    """Return the command line that `make_world` amounts to."""
    sizes = ["--context", "64", "--block-tokens", "256", "--batch-tokens", "256"]
    splits = ["--dev-fraction", "0.2", "--test-fraction", "0.2", "--device", "cpu"]
    paths = [str(world.corpus), "--base", str(world.base_path), "--out", str(cache)]
    return ["extract", *paths, *sizes, *splits]


def test_damage_is_listed_and_exits_with_1_until_it_is_repaired(
    world: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "verify", str(cache)) == 0
    printed = capsys.readouterr().out
    assert "no fault in" in printed
    assert "add --deep" in printed
    flip_byte(cache / SHARD)
    assert call_main(monkeypatch, "verify", str(cache)) == 0
    capsys.readouterr()
    assert call_main(monkeypatch, "verify", str(cache), "--deep") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"train block 1: {SHARD} fails its SHA-256"
    assert "1 fault in" in lines[1]
    assert "the same 'embedcache extract' with --repair" in lines[2]
    assert call_main(monkeypatch, *flags(world, cache), "--repair") == 0
    said = capsys.readouterr().err
    assert f"damaged: train block 1: {SHARD} fails its SHA-256" in said
    assert call_main(monkeypatch, "verify", str(cache), "--deep") == 0


def test_json_lists_the_faults_and_the_exit_code_is_1(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "verify", str(cache), "--json") == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    (cache / SHARD).unlink()
    assert call_main(monkeypatch, "verify", str(cache), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["sound"], found["complete"], found["deep"]) == (False, True, False)
    assert found["faults"] == [
        {"kind": "shard", "file": SHARD, "why": "is missing", "split": "train", "block": 1}
    ]


def test_an_unfinished_cache_says_how_to_resume(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "manifest.json").unlink()
    next((cache / "commits/train").iterdir()).unlink()
    assert call_main(monkeypatch, "verify", str(cache)) == 0
    assert (
        "The cache is not complete: run the same 'embedcache extract' again"
        in capsys.readouterr().out
    )


def test_another_folder_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, "verify", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("embedcache: ")


def test_a_dry_run_of_a_repair_is_refused_and_names_verify(
    world: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(monkeypatch, *flags(world, cache), "--repair", "--dry-run") == 2
    assert f"embedcache verify {cache} --deep" in capsys.readouterr().err
