"""An append that is killed anywhere leaves the cache as it was, or refused, and goes on."""

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
from support.fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents
from support.forked import run_until_step
from support.stopping import KilledError, killed

from embedcache.cache.cache import read_attributes
from embedcache.cache.verify import verify
from embedcache.editing.append import Appended, append
from embedcache.editing.append_request import corpus_like
from embedcache.editing.delete import delete
from embedcache.errors import CacheError
from embedcache.extraction.extract import extract

SETTINGS = {"codec": "int8", "batch_tokens": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished cache, what is to be added, and what it is with that."""
    root = tmp_path_factory.mktemp("killed")
    write_documents(root / "corpus", 5)
    write_documents(root / "more", 5, seed=1)
    extract_first(root, root / "old", tiny_base)
    shutil.copytree(root / "old", root / "new")
    added(root, root / "new")
    return root


def extract_first(place: Path, out: Path, base: Path) -> None:
    extract(
        replace(corpus_config(place / "corpus"), dev_fraction=0.3, test_fraction=0.3),
        base=str(base),
        out=out,
        settings=small_settings(**SETTINGS),
        device="cpu",
    )


def appending(place: Path, cache: Path) -> Callable[[], Appended]:
    config = corpus_like(read_attributes(cache), {"sources": (str(place / "more"),)})
    return partial(append, config, out=cache, device="cpu")


def added(place: Path, cache: Path) -> Appended:
    return appending(place, cache)()


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    place: Path, tiny_base: Path, tmp_path: Path, count: int
) -> None:
    whole = shutil.copytree(place / "old", tmp_path / "whole")
    committed, steps = run_until_step(10**6, appending(place, whole))
    assert comparable_tree(whole) == comparable_tree(place / "new")
    # Until the commit; just before it, all being staged; while files are put in place, which is the
    # first quarter of what follows; at the end.
    draw, placed = random.Random(count), committed + (steps - committed) // 4
    spans = [(0, committed)] * 3 + [(committed - 20, committed)]
    spans += [(committed + 2, placed), (placed, steps)]
    moments = [draw.randrange(*spans[number % 6]) for number in range(count)]
    caches = {shutil.copytree(place / "old", tmp_path / f"{n}"): at for n, at in enumerate(moments)}
    with ThreadPoolExecutor(2) as both:
        ends = [
            both.submit(run_until_step, step, appending(place, cache))
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
            if number % 2:  # the command that made the cache finishes it, too
                extract_first(place, cache, tiny_base)
                assert served(cache) == after
        added(place, cache)
        assert comparable_tree(cache) == comparable_tree(place / "new"), step
        assert verify(cache, deep=True).faults == (), step
    assert states >= {"before", "refused"}


def test_one_that_was_cut_short_while_put_in_place_is_told_when_it_is_finished(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next finishes it: the same command says what it added, delete goes on after."""
    caches = [shutil.copytree(place / "old", tmp_path / name) for name in ("one", "two")]
    for cache in caches:
        with monkeypatch.context() as patch:
            patch.setattr("embedcache.store.transaction.finish_transaction", killed)
            with pytest.raises(KilledError):
                added(place, cache)
    told = added(place, caches[0])
    assert sum(told.documents.values()) == 5
    assert comparable_tree(caches[0]) == comparable_tree(place / "new")
    delete(caches[1], ["003.txt@2"])
    assert not (caches[1] / ".staging").exists()
    delete(caches[0], ["003.txt@2"])
    assert served(caches[0]) == served(caches[1])
