"""A tiny real base and a finished tiny cache of it, made once a session."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from embedcache.base.load import Base, load_base
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import ExtractSettings
from embedcache.carryon.branch.config import BranchConfig
from embedcache.carryon.branch.model import Branch
from embedcache.carryon.saving import CarryOnRecord, save_carryon
from embedcache.corpus.config import CorpusConfig
from embedcache.extraction import estimate, plan, prepare
from embedcache.extraction.extract import extract

# Products of so small a base are done before a second thread is awake; where processes share the
# cores, each would wait for it. Children take it from the environment.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

pytest_plugins = ["support.caches"]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "Paris"]


def pytest_collection_finish() -> None:
    """Have no collection of garbage look at libraries and tests again: trainings ask for many."""
    gc.collect()
    gc.freeze()


SMALL_TRIAL = {"MIN_TOKENS": 1, "MIN_BATCHES": 1, "MAX_BLOCKS": 1, "QUICK_SECONDS": 0.0}
WHOLE_TRIAL = {name: getattr(estimate, name) for name in SMALL_TRIAL}


@pytest.fixture(scope="session", autouse=True)
def small_trial() -> Iterator[None]:
    """Estimate from one batch: most tests look at something else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_TRIAL.items():
            patch.setattr(estimate, name, value)
        yield


@pytest.fixture
def whole_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate from as many batches as outside of tests."""
    for name, value in WHOLE_TRIAL.items():
        monkeypatch.setattr(estimate, name, value)


@pytest.fixture
def without_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit no trial blocks, for tests that stop at the n-th step of a commit."""
    monkeypatch.setattr(prepare, "run_trial", lambda *_, **__: estimate.Trial())


@pytest.fixture(scope="session", autouse=True)
def exact_extraction() -> Iterator[None]:
    """Extract in float32 on every CPU, to be compared with references."""
    with pytest.MonkeyPatch.context() as patch:
        fast = plan.fast_dtype
        exact = {"cpu": torch.float32}
        patch.setattr(plan, "fast_dtype", lambda device: exact.get(device.type) or fast(device))
        yield


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Leave the flushing of files to the kernel: no test takes the power away.

    What is flushed when is still called, counted and stopped; children that are killed do flush.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@dataclass(frozen=True)
class World:
    """A base, a corpus folder and a finished cache of both; treat them as read-only."""

    base_path: Path
    corpus: Path
    cache_path: Path

    def base(self) -> Base:
        return load_base(self.base_path, device="cpu")

    def cache(self) -> Cache:
        return Cache(self.cache_path)


def write_corpus(folder: Path, documents: int = 24, seed: int = 0) -> Path:
    """Write text whose second half of each line repeats the first: something to be learned."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(4)]
        (folder / f"{number:02}.txt").write_text("\n".join(f"{x}; {x}." for x in lines))
    return folder


def make_world(root: Path, *, documents: int = 24, **changes: Any) -> World:
    """Make a base, corpus and cache under ``root``; ``changes`` go to settings or the corpus."""
    arch, tied, taps, codec, dev, device = (
        changes.pop(name, default)
        for name, default in {
            "arch": "llama",
            "tied": True,
            "taps": ("final",),
            "codec": "bf16",
            "dev": 0.2,
            "device": "cpu",
        }.items()
    )
    base = tiny.tiny_base_directory(root / "base", str(arch), bool(tied))
    corpus = write_corpus(root / "corpus", documents)
    config = CorpusConfig(sources=(str(corpus),), context=64, dev_fraction=dev, test_fraction=0.2)
    settings = ExtractSettings(
        context=64, block_tokens=256, batch_tokens=256, taps=taps, codec=codec
    )
    extract(config, base=str(base), out=root / "cache", settings=settings, device=device)
    return World(base, corpus, root / "cache")


def random_carryon(world: World, folder: Path, **shape: Any) -> Path:
    """Save a carry-on of a world's base that was never trained but does something."""
    base = world.cache().attributes.base
    config = BranchConfig(**({"width": 32} | shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branch(config, base["hidden_size"])
        torch.nn.init.normal_(model.branch.weight, std=0.5)
    corpus = world.cache().attributes.corpus
    results = {"parameters": model.parameter_count(), "epochs": 0, "best_epoch": 0}
    record = CarryOnRecord(
        config=config,
        base=base,
        training={},
        cache={"corpus": corpus},
        results=results | {"base_dev": None, "best_dev": None},
    )
    save_carryon(folder, model, record)
    return folder


@pytest.fixture(autouse=True, scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory):
    """Hashes and conversions of this session stay in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> World:
    """A tied llama, 24 documents in train, dev and test, tap ``final``, codec bf16."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tapped(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> World:
    """The same with an untied gemma3 (sliding window, soft-cap) and a second tap, ``layer_1``."""
    return make_world(
        tmp_path_factory.mktemp("tapped"), arch="gemma3_text", tied=False, taps=("final", "layer_1")
    )
