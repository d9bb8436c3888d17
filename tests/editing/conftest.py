"""A cache with appended documents, made once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.fixtures_append import added

from embedcache.editing.append import AppendSummary


@pytest.fixture(scope="session")
def appended(
    olds: dict[str, Path], more: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, AppendSummary]:
    """The int8 cache of ``olds`` with the documents of ``more``; read-only."""
    cache = shutil.copytree(olds["int8"], tmp_path_factory.mktemp("appended") / "cache")
    return cache, added(cache, more)


@pytest.fixture
def grown(appended: tuple[Path, AppendSummary], tmp_path: Path) -> Path:
    """A copy of that cache, to be changed."""
    return shutil.copytree(appended[0], tmp_path / "grown")
