"""An append that is killed anywhere leaves the cache as it was, or refused, and goes on."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_faults import served
from fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents

from embedcache.append import append
from embedcache.append_request import corpus_like
from embedcache.cache.reader import read_attributes
from embedcache.cache.verify import verify
from embedcache.delete import delete
from embedcache.errors import CacheError
from embedcache.extract import extract

SETTINGS = {"codec": "int8", "batch_tokens": 64}

# Forks a child for each place of dying (torch is imported once, and computes in children only). A
# child dies by SIGKILL at one of the calls that change the disk: those are counted, not seconds.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from embedcache.append import append
from embedcache.append_request import corpus_like
from embedcache.cache import rewrite
from embedcache.cache.reader import read_attributes

def counted(call):
    def wrapped(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*arguments, **named)
    return wrapped

for name in ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
finish = rewrite.finish_rewrite
def committing(cache):
    global committed
    committed = left
    return finish(cache)
rewrite.finish_rewrite = committing
told = []
for cache, more, left in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        began = left
        config = corpus_like(read_attributes(Path(cache)), {"sources": (more,)})
        append(config, out=Path(cache), device="cpu")
        os.write(writer, json.dumps([began - committed, began - left]).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    steps = os.read(reader, 100).decode()
    os.close(reader)
    told.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(steps))
print(json.dumps(told))
"""


def run_killed(more: Path, steps: dict[Path, int]) -> list[Any]:
    """Append to each cache until so many steps are done.

    Returns the signal that each died of; of one that did not, its steps to the commit, and in all.
    """
    request = [[str(cache), str(more), step] for cache, step in steps.items()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(request)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


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


def added(place: Path, cache: Path) -> Any:
    config = corpus_like(read_attributes(cache), {"sources": (str(place / "more"),)})
    return append(config, out=cache, device="cpu")


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    place: Path, tiny_base: Path, tmp_path: Path, count: int
) -> None:
    whole = shutil.copytree(place / "old", tmp_path / "whole")
    ((committed, steps),) = run_killed(place / "more", {whole: 10**6})
    assert comparable_tree(whole) == comparable_tree(place / "new")
    # Until the commit; just before it, all being staged; while files are put in place, which is the
    # first quarter of what follows; at the end.
    draw, placed = random.Random(count), committed + (steps - committed) // 4
    spans = [(0, committed)] * 3 + [(committed - 20, committed)]
    spans += [(committed + 2, placed), (placed, steps)]
    moments = [draw.randrange(*spans[number % 6]) for number in range(count)]
    caches = {shutil.copytree(place / "old", tmp_path / f"{n}"): at for n, at in enumerate(moments)}
    assert set(run_killed(place / "more", caches)) == {-signal.SIGKILL}
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

    class KilledError(BaseException):
        """Stands for a process that is gone."""

    def killed(*_: Any) -> None:
        raise KilledError

    caches = [shutil.copytree(place / "old", tmp_path / name) for name in ("one", "two")]
    for cache in caches:
        with monkeypatch.context() as patch:
            patch.setattr("embedcache.cache.rewrite.finish_rewrite", killed)
            with pytest.raises(KilledError):
                added(place, cache)
    told = added(place, caches[0])
    assert sum(told.documents.values()) == 5
    assert comparable_tree(caches[0]) == comparable_tree(place / "new")
    delete(caches[1], ["003.txt@2"])
    assert not (caches[1] / ".staging").exists()
    delete(caches[0], ["003.txt@2"])
    assert served(caches[0]) == served(caches[1])
