"""A cache to be damaged and repaired."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.fixtures_repair import prepared


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base, a corpus, and the cache of an undisturbed run: int8, two taps."""
    return prepared(tmp_path_factory.mktemp("repair"), "int8")


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return shutil.copytree(place / "undisturbed", tmp_path / "cache")
