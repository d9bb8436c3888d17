"""An append that is killed leaves the old cache, the new one or a refused one, and is resumed."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from support.cache_faults import served
from support.fixtures_append import added
from support.fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents
from support.forked import run_until_step
from support.stopping import KilledError, killed

from embedcache.cache.verify import verify
from embedcache.editing.append import AppendSummary, append
from embedcache.editing.delete import delete
from embedcache.errors import CacheError
from embedcache.extraction.extract import extract

SETTINGS = {"codec": "int8", "batch_tokens": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished cache ``old``, the documents ``more``, and the cache ``new`` with them."""
    root = tmp_path_factory.mktemp("killed")
    write_documents(root / "corpus", 5)
    write_documents(root / "more", 5, seed=1)
    extract_first(root, root / "old", tiny_base)
    return root


@pytest.fixture(scope="module")
def steps(place: Path) -> tuple[int, int]:
    """Steps of an append up to its commit, and all of them; the append makes ``new``."""
    done = run_until_step(10**6, appending(place, shutil.copytree(place / "old", place / "new")))
    assert isinstance(done, tuple)
    return done


def extract_first(place: Path, out: Path, base: Path) -> None:
    extract(
        replace(corpus_config(place / "corpus"), dev_fraction=0.3, test_fraction=0.3),
        base=str(base),
        out=out,
        settings=small_settings(**SETTINGS),
        device="cpu",
    )


def appending(place: Path, cache: Path) -> Callable[[], AppendSummary]:
    return partial(append, cache, place / "more", device="cpu")


@pytest.mark.parametrize("count", [4, pytest.param(48, marks=pytest.mark.slow)])
def test_an_append_killed_at_any_step_is_resumed_to_the_same_bytes(
    place: Path, tiny_base: Path, tmp_path: Path, steps: tuple[int, int], count: int
) -> None:
    committed, last = steps
    # While blocks are extracted, just before the commit, while files are moved into place (the
    # first quarter of the steps after the commit), and at the end.
    draw, moved = random.Random(count), committed + (last - committed) // 4
    spans = [(0, committed), (committed - 20, committed), (committed + 2, moved), (moved, last)]
    moments = [draw.randrange(*spans[number % 4]) for number in range(count)]
    caches = {shutil.copytree(place / "old", tmp_path / f"{n}"): at for n, at in enumerate(moments)}
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(run_until_step, step, appending(place, cache))
            for cache, step in caches.items()
        ]
    assert {end.result() for end in ends} == {-signal.SIGKILL}
    before, after = served(place / "old"), served(place / "new")
    states: set[str] = set()
    for number, (cache, step) in enumerate(caches.items()):
        try:
            found = served(cache)
            assert found in (before, after), step
            states.add("before" if found == before else "after")
        except CacheError as error:
            assert "is not complete" in str(error), step
            states.add("refused")
            if number % 8 < 4:  # the extraction that made the cache finishes the append, too
                extract_first(place, cache, tiny_base)
                assert served(cache) == after
        appending(place, cache)()
        assert comparable_tree(cache) == comparable_tree(place / "new"), step
        assert verify(cache, deep=True).faults == (), step
    assert states >= {"before", "refused"}


def test_the_next_edit_finishes_a_committed_append(
    place: Path, tmp_path: Path, steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same append returns its summary; a deletion goes on with the cache as appended."""
    cache = shutil.copytree(place / "old", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("embedcache.store.transaction.finish_transaction", killed)
        with pytest.raises(KilledError):
            added(cache, place / "more")
    other = shutil.copytree(cache, tmp_path / "other")
    summary = added(cache, place / "more")
    assert sum(summary.documents.values()) == 5
    assert comparable_tree(cache) == comparable_tree(place / "new")
    for edited in (cache, other):
        delete(edited, ["003.txt@2"])
        assert not (edited / ".staging").exists()
    assert served(cache) == served(other)
