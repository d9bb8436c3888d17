"""Finished tiny caches, one per codec, and copies of them to damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.fixtures_append import extracted
from support.fixtures_extract import corpus_config, small_settings, write_documents
from support.tiny import tiny_base_directory

from embedcache.extraction.extract import extract

CODECS = ["bf16", "int8", "transform"]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    return tiny_base_directory(tmp_path_factory.mktemp("extract") / "base")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("extract") / "corpus")


@pytest.fixture(scope="session", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def caches(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, corpus: Path
) -> dict[str, Path]:
    """One cache for each codec, of taps ``final`` and ``layer_1``."""
    root = tmp_path_factory.mktemp("caches")
    for codec in CODECS:
        settings = small_settings(codec=codec, taps=("final", "layer_1"))
        extract(
            corpus_config(corpus),
            base=str(tiny_base),
            out=root / codec,
            settings=settings,
            device="cpu",
        )
    return {codec: root / codec for codec in CODECS}


@pytest.fixture
def copied(caches: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the int8 cache that a test may damage."""
    return shutil.copytree(caches["int8"], tmp_path / "cache")


@pytest.fixture(scope="session")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other texts than those of ``corpus``; half of them have the same names."""
    folder = write_documents(tmp_path_factory.mktemp("more") / "corpus", count=9, seed=1)
    for number in range(0, 9, 2):
        (folder / f"{number:03}.txt").rename(folder / f"other-{number}.txt")
    return folder


@pytest.fixture(scope="session")
def olds(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, corpus: Path
) -> dict[str, Path]:
    """Caches as in ``caches``, whose sequences were computed one by one."""
    root = tmp_path_factory.mktemp("olds")
    return {codec: extracted(root / codec, tiny_base, corpus, codec=codec) for codec in CODECS}


@pytest.fixture
def old(olds: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the int8 cache of ``olds``, to which a test may add documents."""
    return shutil.copytree(olds["int8"], tmp_path / "cache")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """A stack of contexts that is closed when the test ends."""
    with ExitStack() as opened:
        yield opened
