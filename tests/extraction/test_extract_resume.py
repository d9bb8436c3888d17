"""An extraction that is stopped anywhere resumes to the same bytes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fixtures_extract import (
    comparable_tree,
    corpus_config,
    small_flags,
    small_settings,
    write_documents,
)
from support.forked import ForkedCommand
from support.stopping import KilledError, stopping
from support.tiny import tiny_base_directory

from embedcache.cache.blocks import commit
from embedcache.cache.tokens import writer as seal
from embedcache.errors import CacheError, EmbedcacheError
from embedcache.extraction import plan, prepare, publish
from embedcache.extraction import run as stage_one
from embedcache.extraction.extract import extract

pytestmark = pytest.mark.usefixtures("without_trial")


def prepared(root: Path, documents: int) -> Path:
    """Make a folder with a base, a corpus, and the cache of an undisturbed run."""
    tiny_base_directory(root / "base")
    write_documents(root / "corpus", documents, words=150)
    run(root, root / "undisturbed")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """Some 10 blocks."""
    return prepared(tmp_path_factory.mktemp("small"), 8)


@pytest.fixture(scope="module")
def long_place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """Enough blocks to stop a process between two of them."""
    return prepared(tmp_path_factory.mktemp("long"), 40)


def run(place: Path, out: Path, **changes: Any) -> Any:
    return extract(
        changes.pop("corpus", None) or corpus_config(place / "corpus"),
        base=str(changes.pop("base", place / "base")),
        out=out,
        settings=small_settings(**changes),
        device="cpu",
    )


def wait_for(ready: Any, process: Any) -> None:
    """Wait until ``ready`` returns true; the process must still be running."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def markers(out: Path) -> int:
    return sum(1 for _ in out.glob("commits/*/*.json"))


def sealing(out: Path) -> bool:
    return any(out.glob(".staging/*/pass0/train/tokens"))


@pytest.mark.parametrize(
    "ready",
    [
        pytest.param(sealing, id="sealing", marks=pytest.mark.slow),
        pytest.param(lambda out: markers(out) >= 1, id="first", marks=pytest.mark.slow),
        pytest.param(lambda out: markers(out) >= 20, id="middle"),
    ],
)
def test_a_killed_extraction_resumes_to_the_same_bytes(
    long_place: Path, tmp_path: Path, ready: Callable[[Path], bool]
) -> None:
    out = tmp_path / "cache"
    process = ForkedCommand(*small_flags(long_place / "corpus", long_place / "base", out))
    wait_for(lambda: ready(out), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    before = markers(out)
    summary = run(long_place, out)
    assert summary.resumed_blocks == before < summary.blocks
    assert comparable_tree(out) == comparable_tree(long_place / "undisturbed")


def test_ctrl_c_exits_130_with_a_message_and_resumes(long_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    flags = small_flags(long_place / "corpus", long_place / "base", out)
    process = ForkedCommand(*flags)
    wait_for(lambda: markers(out) >= 3, process)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert printed == ""
    prediction, message = said.splitlines()
    assert "tokens to go" in prediction
    assert message == "embedcache: interrupted; run the same command again to resume"
    summary = run(long_place, out)
    assert summary.resumed_blocks >= 3
    assert comparable_tree(out) == comparable_tree(long_place / "undisturbed")


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        pytest.param(seal, "fsync_tree", 1, id="tokens are written"),
        pytest.param(seal, "fsync_path", 50, id="tokens are being flushed"),
        pytest.param(Path, "rename", 4, id="splits are in place"),
        pytest.param(prepare, "fsync_tree", 1, id="the base is staged"),
        pytest.param(commit, "write_shard", 9, id="a shard is to be staged"),
        pytest.param(commit, "promote", 7, id="a marker is linked"),
        pytest.param(publish, "publish_manifest", 1, id="all blocks are there"),
        pytest.param(stage_one, "clear_staging", 2, id="the manifest is there"),
    ],
)
def test_an_extraction_stopped_at_any_step_resumes_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int
) -> None:
    with monkeypatch.context() as patch:
        # What a dying process would not do, it does not do here either: nothing is cleared up.
        patch.setattr(plan, "_clear", lambda out: None)
        patch.setattr(commit.BlockWriter, "close", lambda self: None)
        patch.setattr(module, name, stopping(getattr(module, name), call))
        with pytest.raises(KilledError):
            run(place, tmp_path / "cache")
    run(place, tmp_path / "cache")
    assert comparable_tree(tmp_path / "cache") == comparable_tree(place / "undisturbed")


def test_a_block_lost_before_the_manifest_is_computed_again(place: Path, tmp_path: Path) -> None:
    out = shutil.copytree(place / "undisturbed", tmp_path / "cache")
    (out / "manifest.json").unlink()
    (out / "train/embeddings/final/c/3/0").unlink()
    summary = run(place, out)
    assert summary.resumed_blocks == summary.blocks - 1
    assert comparable_tree(out) == comparable_tree(place / "undisturbed")


def test_lost_tokens_are_not_computed_as_zeros(place: Path, tmp_path: Path) -> None:
    out = shutil.copytree(place / "undisturbed", tmp_path / "cache")
    (out / "manifest.json").unlink()
    for lost in ("train/embeddings/final/c/3/0", "train/tokens/ids/c/3"):
        (out / lost).unlink()
    with pytest.raises(CacheError, match=r"train/tokens/ids/c/3 is missing.*`embedcache\.repair\("):
        run(place, out)


@pytest.mark.parametrize("complete", [False, True])
def test_resuming_with_another_request_is_refused_naming_the_setting(
    place: Path, tmp_path: Path, complete: bool
) -> None:
    out = shutil.copytree(place / "undisturbed", tmp_path / "cache")
    if not complete:
        (out / "manifest.json").unlink()
    before = comparable_tree(out)
    other = write_documents(tmp_path / "other", 3)
    changes: dict[str, dict[str, Any]] = {
        "codec was 'bf16', now 'int8'": {"codec": "int8"},
        "taps was": {"taps": ("final", "layer_1")},
        "block_tokens was 256, now 512": {"block_tokens": 512},
        "batch_tokens was 256, now 64": {"batch_tokens": 64},
        "sources was": {"corpus": corpus_config(other)},
        "split_seed was 0, now 1": {"corpus": corpus_config(place / "corpus", split_seed=1)},
        "They differ in: weights": {"base": tiny_base_directory(tmp_path / "base", seed=1)},
    }
    for message, change in changes.items():
        with pytest.raises(EmbedcacheError, match=message):
            run(place, out, **change)
    assert comparable_tree(out) == before
