"""A rewrite happens whole, once, whoever finishes it and whoever comes late."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from embedcache.cache.format.layout import MANIFEST, STAGING
from embedcache.store.transaction import begin_rewrite, commit_rewrite, finish_rewrite, is_rewriting


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in (MANIFEST, "kept", "changed", "removed"):
        (tmp_path / name).write_text("old")
    return tmp_path


def stage(cache: Path) -> Path:
    staging = cache / STAGING / "attempt"
    files = begin_rewrite(staging)
    for name in (MANIFEST, "changed", "made/anew"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("new")
    return staging


def held(cache: Path) -> dict[str, str]:
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {path.relative_to(cache).as_posix(): path.read_text() for path in files}


NEW = {MANIFEST: "new", "kept": "old", "changed": "new", "made/anew": "new"}


def test_all_is_as_staged(cache: Path) -> None:
    commit_rewrite(cache, stage(cache), remove=["removed"], about={"what": 1})
    assert held(cache) == NEW
    assert not is_rewriting(cache)
    assert finish_rewrite(cache) is None


def test_what_was_cleared_and_staged_on_is_not_committed(cache: Path) -> None:
    before, staging = held(cache), stage(cache)
    shutil.rmtree(staging)
    (staging / "files").mkdir(parents=True)
    (staging / "files" / MANIFEST).write_text("half of it")
    with pytest.raises(FileNotFoundError):
        commit_rewrite(cache, staging, remove=["removed"], about={})
    shutil.rmtree(staging)
    assert held(cache) == before


def test_one_that_slept_while_another_finished_it_takes_no_manifest_away(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file, staged = Path.is_file, cache / STAGING / "rewrite/files" / MANIFEST

    def sleepy(path: Path) -> bool:
        found = is_file(path)
        if path == staged:
            monkeypatch.setattr(Path, "is_file", is_file)
            assert finish_rewrite(cache) == {"what": 1}
            (cache / MANIFEST).write_text("newer still")
        return found

    monkeypatch.setattr(Path, "is_file", sleepy)
    with pytest.raises(FileNotFoundError):
        commit_rewrite(cache, stage(cache), remove=["removed"], about={"what": 1})
    assert held(cache) == NEW | {MANIFEST: "newer still"}
