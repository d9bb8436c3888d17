"""Verifying a cache while it is being written never reports damage that is none."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import names
from support.fixtures_extract import (
    call_main,
    corpus_config,
    flip_byte,
    small_flags,
    small_settings,
)
from support.forked import ForkedCommand

from embedcache.cache import verify as verifying
from embedcache.cache.blocks import commit
from embedcache.cache.format.layout import MANIFEST, marker_path
from embedcache.cache.tokens import writer as tokens_writer
from embedcache.cache.verify import verify
from embedcache.editing import repair
from embedcache.editing.delete import delete
from embedcache.editing.merge import merge
from embedcache.errors import CacheError
from embedcache.extraction import prepare, publish
from embedcache.extraction import run as stage_one
from embedcache.extraction.extract import extract
from embedcache.store import transaction
from embedcache.store.lease import Leases

pytestmark = pytest.mark.usefixtures("without_trial")

SHARD = "train/embeddings/final/c/1/0"
BEING_WRITTEN = (
    r"is being written by process \d+|documents are being deleted|not an embedcache|no such cache"
)
SETTINGS = small_settings(codec="int8", taps=("final", "layer_1"))


def run(corpus: Path, base: Path, out: Path, **more: Any) -> Any:
    return extract(
        corpus_config(corpus),
        base=str(base),
        out=out,
        settings=SETTINGS,
        device="cpu",
        **more,
    )


def at_every_call(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[Any, str]], look: Callable[[], object]
) -> None:
    """Call ``look`` before and after every call of each function."""

    def watched(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            look()
            result = real(*arguments, **more)
            look()
            return result

        return call

    for module, name in steps:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))


def looks_at(out: Path, real: set[str], seen: list[str]) -> Callable[[], None]:
    """Return a function that verifies: only ``real`` faults may be found, unless it is written."""

    def look() -> None:
        try:
            faults = verify(out, deep=True).faults
        except CacheError as error:
            assert re.search(BEING_WRITTEN, str(error)), error
            seen.append("being written")
            return
        assert {fault.file for fault in faults} <= real
        seen.append("faults" if faults else "whole")

    return look


WRITING = [
    (tokens_writer, "publish_digests"),
    (prepare, "fsync_tree"),
    (commit, "promote"),
    (commit.os, "link"),
    (publish, "publish_manifest"),
    (stage_one, "drop_superseded"),
    (stage_one, "clear_staging"),
]


def test_during_an_extraction(
    corpus: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "cache", []
    with monkeypatch.context() as patch:
        at_every_call(patch, WRITING, looks_at(out, set(), seen))
        run(corpus, tiny_base, out)
    assert "faults" not in seen
    assert "whole" in seen
    assert verify(out, deep=True).writers == ()


def test_during_a_repair(
    copied: Path, corpus: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    damaged = [SHARD, "base/head/weight/c/0/0", "train/tokens/ids/c/0", "tokens.json"]
    for name in damaged:
        flip_byte(copied / name)
    steps = [*WRITING[1:], (repair, "publish_digests"), (repair, "tokenise")]
    with monkeypatch.context() as patch:
        at_every_call(patch, steps, looks_at(copied, set(), seen))
        repair.repair(
            copied, corpus_config(corpus), base=tiny_base, settings=SETTINGS, device="cpu"
        )
    assert set(seen) == {"being written", "whole"}
    assert verify(copied, deep=True).faults == ()


def test_during_a_deletion(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    steps = [(transaction, "fsync_path"), (transaction, "make_folder"), (transaction, "fsync_tree")]
    with monkeypatch.context() as patch:
        at_every_call(patch, steps, looks_at(copied, set(), seen))
        delete(copied, [names(copied, "train")[0]])
    assert set(seen) == {"being written", "whole"}
    assert verify(copied, deep=True).faults == ()


def test_an_interrupted_deletion_is_no_damage(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = names(copied, "train")[0]
    flushed: list[Path] = []

    def killed(path: Path) -> None:
        flushed.append(path)
        if len(flushed) == 3:  # committed, and the manifest is removed
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "fsync_path", killed)
        with pytest.raises(KeyboardInterrupt):
            delete(copied, [name])
    assert not (copied / MANIFEST).exists()
    with pytest.raises(CacheError, match=r"interrupted.*the same `embedcache\.delete\(\)`"):
        verify(copied)
    delete(copied, [name])
    assert verify(copied, deep=True).faults == ()


def test_a_cache_that_changed_meanwhile_is_verified_again(
    copied: Path, corpus: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion begins and ends after the manifest was read."""
    name, calls, read = names(copied, "train")[0], [], verifying._Verifier._read_digests

    def changed(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            monkeypatch.setattr(verifying._Verifier, "_read_digests", read)
            delete(copied, [name])
            monkeypatch.setattr(verifying._Verifier, "_read_digests", changed)
        return read(self)

    monkeypatch.setattr(verifying._Verifier, "_read_digests", changed)
    assert verify(copied, deep=True).faults == ()
    assert len(calls) == 2


def test_damage_is_reported_only_when_no_process_writes(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(copied / SHARD)
    with Leases(copied), pytest.raises(CacheError, match=rf"is being written .*{SHARD} fails"):
        verify(copied, deep=True)
    (fault,) = verify(copied, deep=True).faults
    assert fault.file == SHARD


def test_the_command_names_the_processes_that_write(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / MANIFEST).unlink()
    marker_path(copied, "train", 0).unlink()
    with Leases(copied):
        assert call_main(monkeypatch, "verify", str(copied)) == 0
    assert f"The cache is being written by process {os.getpid()} on " in capsys.readouterr().out


@pytest.mark.slow
def test_beside_a_process_that_extracts(corpus: Path, tiny_base: Path, tmp_path: Path) -> None:
    """At random moments: every result is without faults, or the error says why not."""
    out, seen = tmp_path / "cache", []
    flags = [*small_flags(corpus, tiny_base, out), "--codec", "int8", "--taps", "final,layer_1"]
    process = ForkedCommand(*flags)
    look = looks_at(out, set(), seen)
    while process.poll() is None:
        look()
    said = process.communicate()[1]
    assert process.returncode == 0, said
    look()
    assert seen[-1] == "whole"


def test_the_command_says_how_to_repair_a_merged_cache(
    copied: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(copied, tmp_path / "other")
    every = [name for split in ("train", "dev", "test") for name in names(copied, split)]
    delete(copied, every[::2])
    delete(other, every[1::2])
    merge([copied, other], tmp_path / "both")
    assert call_main(monkeypatch, "verify", str(tmp_path / "both"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"] == [[str(corpus)]] * 2
    flip_byte(tmp_path / "both" / SHARD)
    assert call_main(monkeypatch, "verify", str(tmp_path / "both"), "--deep") == 1
    shown = capsys.readouterr().out
    assert f"run 'embedcache extract --repair --out {tmp_path / 'both'}'" in shown
    assert "Run the same" not in shown
    flip_byte(tmp_path / "both/train/tokens/ids/c/0")
    assert call_main(monkeypatch, "verify", str(tmp_path / "both"), "--deep") == 1
    shown = capsys.readouterr().out
    assert f"Its 2 caches were made by: 'embedcache extract {corpus} …'; " in shown
    assert "then 'embedcache merge' with a new --out" in shown
    assert "Run the same" not in shown
