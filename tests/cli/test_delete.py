"""``embedcache delete``: output, JSON and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import contents, names
from support.fixtures_extract import call_main, comparable_tree, flip_byte

from embedcache.cache.verify import verify

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(world: Any, tmp_path: Path) -> Path:
    return shutil.copytree(world.cache_path, tmp_path / "cache")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``embedcache delete``; return its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = call_main(monkeypatch, "delete", *map(str, arguments))
        return code, *capsys.readouterr()

    return run


def test_it_prints_what_it_deletes(cache: Path, call: Call) -> None:
    before, (first, second, *_) = contents(cache), names(cache, "train")
    chosen = ["--document", first, "--document", second]
    gone = {key: value for key, value in before.items() if key[1] in (first, second)}
    code, printed, said = call(cache, *chosen, "--dry-run")
    assert (code, said) == (0, "")
    would, counts = printed.splitlines()
    assert would == f"would delete  {first}, {second}"
    tokens = sum(len(value["ids"]) // 8 for value in gone.values())
    expected = rf"train         {tokens:,} tokens, {len(gone):,} sequences, \d+ blocks? to rewrite"
    assert re.fullmatch(expected, counts)
    assert contents(cache) == before
    code, printed, said = call(cache, *chosen)
    assert (code, said) == (0, "")
    assert printed.splitlines()[0] == f"deleted  {first}, {second}"
    assert printed.endswith(" rewritten\n")
    assert contents(cache) == {key: value for key, value in before.items() if key not in gone}
    assert verify(cache, deep=True).faults == ()


@pytest.mark.parametrize("dry_run", [False, True])
def test_json_is_alone_on_stdout(cache: Path, call: Call, dry_run: bool) -> None:
    before, name = comparable_tree(cache), names(cache, "dev")[0]
    flags = ["--dry-run"] if dry_run else []
    code, printed, said = call(cache, "--document", name, "--json", *flags)
    assert (code, said) == (0, "")
    found = json.loads(printed)
    assert found["documents"] == [name]
    assert found["dry_run"] is dry_run
    assert found["sequences"].keys() == found["tokens"].keys() == {"dev"}
    assert found["tokens"]["dev"] > 0
    assert (comparable_tree(cache) == before) is dry_run
    assert (name in names(cache, "dev")) is dry_run


def test_an_unknown_name_is_a_usage_error_with_the_nearest_name(cache: Path, call: Call) -> None:
    before, name = comparable_tree(cache), names(cache, "train")[0]
    for flags in ([], ["--dry-run"]):
        code, printed, said = call(cache, "--document", name, "--document", f"{name}t", *flags)
        assert (code, printed) == (2, "")
        assert said.startswith(f"embedcache: {cache} has no document '{name}t'")
        assert f"Did you mean '{name}'?" in said
        assert said.count("\n") == 1
    assert comparable_tree(cache) == before


def test_deleting_all_of_train_is_a_usage_error_that_names_rm(cache: Path, call: Call) -> None:
    every = [flag for name in names(cache, "train") for flag in ("--document", name)]
    code, printed, said = call(cache, *every)
    assert (code, printed) == (2, "")
    assert f"rm -r {cache}" in said


def test_a_cache_that_cannot_be_edited_exits_with_1(cache: Path, call: Call) -> None:
    name = names(cache, "train")[0]
    flip_byte(cache / "train/tokens/ids/c/0")
    code, printed, said = call(cache, "--document", name)
    assert (code, printed) == (1, "")
    assert "is damaged" in said
    assert "nothing was deleted" in said
    (cache / "manifest.json").unlink()
    code, _, said = call(cache, "--document", name)
    assert code == 1
    assert said.startswith("embedcache: ")
    code, _, said = call(cache / "absent", "--document", name)
    assert code == 1
    assert "no such cache" in said
    assert not (cache / "absent").exists()


def test_a_missing_document_option_is_a_usage_error(cache: Path, call: Call) -> None:
    code, _, said = call(cache)
    assert code == 2
    assert "--document" in said
