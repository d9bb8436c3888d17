"""Every test here has a home of its own, so that none sees or leaves a hash or a conversion."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EMBEDCACHE_HOME", str(path))
    return path
