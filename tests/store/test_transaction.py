"""A transaction is done whole and once, whichever process finishes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from embedcache.store.files import STAGING
from embedcache.store.transaction import (
    begin_transaction,
    commit_transaction,
    finish_transaction,
    transaction_pending,
)

LAST = "last.json"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in (LAST, "kept", "changed", "removed"):
        (tmp_path / name).write_text("old")
    return tmp_path


def stage(cache: Path) -> Path:
    staging = cache / STAGING / "attempt"
    files = begin_transaction(staging)
    for name in (LAST, "changed", "made/anew"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("new")
    return staging


def held(cache: Path) -> dict[str, str]:
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {path.relative_to(cache).as_posix(): path.read_text() for path in files}


NEW = {LAST: "new", "kept": "old", "changed": "new", "made/anew": "new"}


def test_files_are_replaced_made_and_removed(cache: Path) -> None:
    commit_transaction(cache, stage(cache), last=LAST, remove=["removed"], about={"what": 1})
    assert held(cache) == NEW
    assert not transaction_pending(cache)
    assert finish_transaction(cache) is None


def test_an_attempt_whose_staging_was_removed_commits_nothing(cache: Path) -> None:
    before, staging = held(cache), stage(cache)
    shutil.rmtree(staging)
    (staging / "files").mkdir(parents=True)
    (staging / "files" / LAST).write_text("a part")
    with pytest.raises(FileNotFoundError):
        commit_transaction(cache, staging, last=LAST, remove=["removed"], about={})
    shutil.rmtree(staging)
    assert held(cache) == before


def test_a_process_that_slept_while_another_finished_removes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file, staged = Path.is_file, cache / STAGING / "transaction/files" / LAST

    def asleep(path: Path) -> bool:
        found = is_file(path)
        if path == staged:
            monkeypatch.setattr(Path, "is_file", is_file)
            assert finish_transaction(cache) == {"what": 1}
            (cache / LAST).write_text("newer")
        return found

    monkeypatch.setattr(Path, "is_file", asleep)
    with pytest.raises(FileNotFoundError):
        commit_transaction(cache, stage(cache), last=LAST, remove=["removed"], about={"what": 1})
    assert held(cache) == NEW | {LAST: "newer"}
