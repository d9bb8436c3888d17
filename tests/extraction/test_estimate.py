"""The estimate of an extraction, compared with the finished cache."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents
from support.tiny import tiny_base_directory

from embedcache.base.forward import BlockForward
from embedcache.cache import base_arrays
from embedcache.cache.blocks import commit
from embedcache.errors import OutputError
from embedcache.extraction.extract import estimate_extraction, extract
from embedcache.progress import SILENT

USERS_HOME = os.environ.get("EMBEDCACHE_HOME", str(Path.home() / ".cache" / "embedcache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A base whose token embedding is not its head, and a corpus of some 30 blocks."""
    root = tmp_path_factory.mktemp("estimate")
    tiny_base_directory(root / "base", "llama", tied=False)
    write_documents(root / "corpus", 40, words=150)
    return root


class Remarks:
    """Progress that keeps what is said."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def bar(self, title: str, total: int | None, unit: str) -> Any:
        return SILENT.bar(title, total, unit)

    def say(self, remark: str) -> None:
        self.remarks.append(remark)


def request(place: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return {
        "base": str(place / "base"),
        "out": out,
        "settings": small_settings(**settings),
        "device": "cpu",
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("whole_trial")
@pytest.mark.parametrize(
    ("codec", "block_tokens", "taps"),
    [
        ("bf16", 256, ("final", "layer_1")),
        ("int8", 256, ("final",)),
        ("transform", 2048, ("final",)),
        pytest.param("bf16", 2048, ("final",), marks=pytest.mark.slow),
        pytest.param("int8", 2048, ("final", "layer_1"), marks=pytest.mark.slow),
        pytest.param("transform", 256, ("final", "layer_1"), marks=pytest.mark.slow),
    ],
)
def test_bytes_are_estimated_within_two_percent(
    place: Path, tmp_path: Path, codec: str, block_tokens: int, taps: tuple[str, ...]
) -> None:
    settings = {"codec": codec, "block_tokens": block_tokens, "taps": taps}
    corpus, asked = corpus_config(place / "corpus"), request(place, tmp_path / "cache", **settings)
    found, counted = estimate_extraction(corpus, **asked)
    assert not (tmp_path / "cache").exists()
    summary = extract(corpus, **asked)
    real = size_of(tmp_path / "cache")
    assert summary.bytes == real
    assert abs(found.bytes / real - 1) < 0.02
    assert abs(summary.estimated_bytes / real - 1) < 0.02
    assert found.tokens == summary.tokens == counted["tokens"]
    assert found.bytes_to_go == found.bytes
    assert 2000 <= found.measured_tokens <= sum(summary.tokens.values())


@pytest.mark.usefixtures("whole_trial")
def test_the_rest_of_a_begun_cache_is_estimated(place: Path, tmp_path: Path) -> None:
    corpus, out = corpus_config(place / "corpus"), tmp_path / "cache"
    extract(corpus, **request(place, out))
    real = size_of(out)
    assert estimate_extraction(corpus, **request(place, out))[0].bytes_to_go == 0
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "base")
    for block in range(0, 20, 2):
        for path in [f"train/embeddings/final/c/{block}/0", f"commits/train/{block:08d}.0.json"]:
            (out / path).unlink()
    gone = real - size_of(out)
    before = comparable_tree(out)
    found, _ = estimate_extraction(corpus, **request(place, out))
    assert comparable_tree(out) == before
    assert abs(found.bytes_to_go / gone - 1) < 0.03
    assert abs(found.bytes - found.bytes_to_go - (real - gone)) < 1
    progress = Remarks()
    summary = extract(None, base=place / "base", out=str(out), device="cpu", progress=progress)
    assert abs(summary.estimated_bytes / real - 1) < 0.02
    assert progress.remarks[0].startswith("resuming: ")
    assert progress.remarks[1].startswith(f"{found.tokens_to_go:,} tokens to go: about ")


def slow_forward(patch: pytest.MonkeyPatch) -> None:
    """Let the base take a time of its own for each token of a batch, padding included."""
    real = BlockForward._padded

    def slow(self: BlockForward, ids_N: Any, rows_S2: Any, width: int) -> torch.Tensor:
        ids_BT = real(self, ids_N, rows_S2, width)
        time.sleep(4e-4 * ids_BT.numel())
        return ids_BT

    patch.setattr(BlockForward, "_padded", slow)


def slow_commit(patch: pytest.MonkeyPatch) -> None:
    """Let the shard of a block take 60 ms, which is far more than its forward pass."""
    real = commit.write_shard

    def slow(*arguments: Any) -> Any:
        time.sleep(0.06)
        return real(*arguments)

    patch.setattr(commit, "write_shard", slow)


def slow_base(patch: pytest.MonkeyPatch) -> None:
    """Let the head and the token embedding have 24 chunks each, of 60 ms."""
    real = base_arrays.write_chunk

    def slow(*arguments: Any) -> Any:
        time.sleep(0.06)
        return real(*arguments)

    patch.setattr(base_arrays, "CHUNK_ROWS", 16)
    patch.setattr("embedcache.extraction.estimate.BASE_CHUNK_ROWS", 16)
    patch.setattr(base_arrays, "write_chunk", slow)


@pytest.mark.usefixtures("whole_trial")
@pytest.mark.parametrize(
    "slow",
    [
        slow_forward,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (slow_commit, slow_base)),
    ],
)
def test_time_is_estimated_within_thirty_percent_whatever_takes_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Any
) -> None:
    slow(monkeypatch)
    corpus, asked = corpus_config(place / "corpus"), request(place, tmp_path / "cache")
    found, _ = estimate_extraction(corpus, **asked)
    summary = extract(corpus, **asked)
    assert summary.seconds > 1
    assert abs(found.seconds / summary.seconds - 1) < 0.3
    assert abs(summary.estimated_seconds / summary.seconds - 1) < 0.3
    assert found.tokens_per_second == pytest.approx(found.tokens_to_go / found.seconds, rel=1e-3)


def test_what_was_sampled_is_not_computed_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[bytes] = []
    real = BlockForward.batch

    def counted(self: BlockForward, ids_N: Any, rows_B2: Any) -> Any:
        computed.append(ids_N.tobytes() + rows_B2.tobytes())
        return real(self, ids_N, rows_B2)

    monkeypatch.setattr(BlockForward, "batch", counted)
    monkeypatch.setattr("embedcache.extraction.estimate.MIN_TOKENS", 1000)
    extract(
        corpus_config(place / "corpus"), **request(place, tmp_path / "cache", block_tokens=1024)
    )
    _, *rest = computed  # the first warms up
    assert len(rest) > 10
    assert len(set(rest)) == len(rest)


class TestDisk:
    def free(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        usage = shutil._ntuple_diskusage(10**9, 10**9, count)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    @pytest.mark.parametrize("made", [False, True])
    def test_a_disk_a_little_too_small_is_refused_and_nothing_is_left(
        self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
    ) -> None:
        corpus, out = corpus_config(place / "corpus"), tmp_path / "cache"
        needed = estimate_extraction(corpus, **request(place, out))[0].bytes
        if made:
            out.mkdir()
        self.free(monkeypatch, int(needed * 0.7))
        with pytest.raises(OutputError, match=r"needs about .* GB more.*`limit_tokens=`"):
            extract(corpus, **request(place, out))
        assert out.exists() == made
        assert not made or not list(out.iterdir())

    def test_a_begun_cache_stays_when_the_disk_is_full(
        self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        corpus, out = corpus_config(place / "corpus"), tmp_path / "cache"
        extract(corpus, **request(place, out))
        (out / "manifest.json").unlink()
        (out / "train/embeddings/final/c/3/0").unlink()
        before = comparable_tree(out)
        self.free(monkeypatch, 1000)
        with pytest.raises(OutputError, match="needs about"):
            extract(corpus, **request(place, out))
        # only the marker of the lost block is withdrawn
        assert before.keys() - comparable_tree(out).keys() == {"commits/train/00000003.0.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("whole_trial")
@pytest.mark.parametrize(
    "settings",
    [{}, {"codec": "int8", "taps": ("final", "layer_15")}, {"codec": "transform", "bits": 1.5}],
    ids=["bf16", "int8", "transform"],
)
def test_a_real_base_over_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Bytes within 2 %, time within 30 %; about a minute on two cores.

    On a machine that is shared, load may change between the estimate and the run. An estimate that
    is wrong of itself is wrong three times.
    """
    monkeypatch.setenv("EMBEDCACHE_HOME", USERS_HOME)
    asked: dict[str, Any] = {"base": "builtin:smollm2-135m", "limit_tokens": 30_000} | settings
    missed = []
    for attempt in range(3):
        out = tmp_path / str(attempt)
        found, _ = estimate_extraction("stdlib:", **asked, out=out, device="cpu")
        summary = extract("stdlib:", **asked, out=out, device="cpu")
        real = size_of(out)
        assert abs(found.bytes / real - 1) < 0.02
        assert abs(summary.estimated_bytes / real - 1) < 0.02
        ratios = [t / summary.seconds for t in (found.seconds, summary.estimated_seconds)]
        if all(abs(ratio - 1) < 0.3 for ratio in ratios):
            return
        missed.append(ratios)
    raise AssertionError(missed)
