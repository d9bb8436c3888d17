"""Stage one compared with transformers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents
from support.tiny import tiny_base_directory, tiny_tokenizer
from transformers import AutoModelForCausalLM

from embedcache.base.forward import BlockForward, plan_batches
from embedcache.base.load import load_base
from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.format.layout import ExtractSettings
from embedcache.errors import (
    BaseModelError,
    CacheError,
    NumericsError,
    OutputError,
    UsageError,
)
from embedcache.extraction import plan
from embedcache.extraction.extract import extract


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("extract") / "corpus")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    return tiny_base_directory(tmp_path_factory.mktemp("extract") / "base")


def run(corpus: Path, base: Path, out: Path, dtype: str = "auto", **settings: Any) -> Any:
    return extract(
        corpus_config(corpus),
        base=str(base),
        out=out,
        settings=small_settings(**settings),
        device="cpu",
        dtype=dtype,
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
def test_the_cache_holds_the_hidden_states_of_transformers(
    tmp_path: Path, corpus: Path, session_home: None, arch: str
) -> None:
    base = tiny_base_directory(tmp_path / "base", arch)
    run(corpus, base, tmp_path / "cache", taps=("final", "layer_1"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    cache = Cache(tmp_path / "cache")
    sequences = 0
    for name in ("train", "dev", "test"):
        split = cache.split(name)
        for number in range(split.manifest.blocks):
            block = split.block(number)
            for first, stop in block.rows_S2.tolist():
                with torch.no_grad():
                    ids = torch.from_numpy(block.ids_N[first:stop])[None]
                    hidden = model(ids, output_hidden_states=True).hidden_states
                for tap, expected in (("final", hidden[-1][0]), ("layer_1", hidden[1][0])):
                    found = block.x_NH[tap][first:stop].float()
                    # half a step of bfloat16, and what batches change of float32
                    assert ((found - expected).abs() <= expected.abs() * 2**-8 + 2e-6).all()
                sequences += 1
    assert sequences == sum(split.sequences for split in cache.manifest.splits.values()) > 10


def test_the_summary_counts_what_the_cache_holds(tmp_path: Path, corpus: Path, base: Path) -> None:
    summary = run(corpus, base, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert summary.tokens == {name: s.tokens for name, s in cache.manifest.splits.items()}
    assert summary.blocks == sum(split.blocks for split in cache.manifest.splits.values())
    assert summary.quarantined == summary.resumed_blocks == 0
    assert summary.self_check < 1e-5
    assert not (tmp_path / "cache" / ".staging").exists()
    again = run(corpus, base, tmp_path / "cache")
    assert again.bytes == summary.bytes


def poisoned_base(path: Path, character: str) -> Path:
    """Make a base whose embedding of one character is not a number."""
    tiny_base_directory(path, tied=False)
    weights = load_file(path / "model.safetensors")
    token = tiny_tokenizer().convert_tokens_to_ids(character)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_sequence_that_is_not_finite_is_quarantined_and_never_read(
    tmp_path: Path, corpus: Path, session_home: None
) -> None:
    base = poisoned_base(tmp_path / "base", "~")
    texts = shutil.copytree(corpus, tmp_path / "corpus")
    clean = (texts / "004.txt").read_text()
    (texts / "004.txt").write_text("~ " + clean)
    summary = run(texts, base, tmp_path / "cache")
    assert summary.quarantined == 1
    cache = Cache(tmp_path / "cache")
    token = tiny_tokenizer().convert_tokens_to_ids("~")
    read = 0
    for name in ("train", "dev", "test"):
        split = cache.split(name)
        for number in range(split.manifest.blocks):
            block = split.block(number)
            assert not set(block.sequence_S.tolist()) & set(map(int, split.files.quarantined))
            read += len(block.sequence_S)
            assert block.x_NH["final"].isfinite().all()
            for first, stop in block.rows_S2.tolist():
                assert token not in block.ids_N[first:stop]
                assert (block.x_NH["final"][first:stop] != 0).any(dim=1).all()
    assert read == sum(split.sequences for split in cache.manifest.splits.values()) - 1


def test_too_many_that_are_not_finite_stop_the_run_and_every_later_one(
    tmp_path: Path, session_home: None
) -> None:
    base = poisoned_base(tmp_path / "base", "~")
    texts = write_documents(tmp_path / "corpus", 30)
    for path in sorted(texts.iterdir())[:14]:
        path.write_text("~ " + path.read_text())
    for _ in range(2):  # what earlier runs put aside counts, too
        with pytest.raises(NumericsError, match=r"not finite, expected at most 1\.00%"):
            run(texts, base, tmp_path / "cache")
        assert not (tmp_path / "cache" / "manifest.json").exists()
    summary = extract(
        corpus_config(texts),
        base=str(base),
        out=tmp_path / "cache",
        settings=small_settings(),
        device="cpu",
        max_quarantined=0.9,
    )
    assert summary.quarantined == 14


def test_a_small_corpus_that_is_mostly_not_finite_is_no_cache(
    tmp_path: Path, session_home: None
) -> None:
    base = poisoned_base(tmp_path / "base", "~")
    texts = write_documents(tmp_path / "corpus", 5, words=30)
    for path in texts.iterdir():
        path.write_text("~ " + path.read_text())
    with pytest.raises(NumericsError, match=r"not finite"):
        run(texts, base, tmp_path / "cache")


def test_a_base_that_padding_changes_is_refused(
    tmp_path: Path, corpus: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BlockForward._padded

    def left(self: BlockForward, ids_N: Any, rows_S2: Any, width: int) -> torch.Tensor:
        """Pad on the left, so that no token is at its own position."""
        ids_BT = right(self, ids_N, rows_S2, width)
        for b, (first, stop) in enumerate(rows_S2.tolist()):
            ids_BT[b] = ids_BT[b].roll(ids_BT.shape[1] - (stop - first))
        return ids_BT

    monkeypatch.setattr(BlockForward, "_padded", left)
    with pytest.raises(NumericsError, match=r"not computed correctly in padded.*`batch_tokens=`"):
        run(corpus, base, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_the_self_check_passes_and_sees_a_small_error(base: Path) -> None:
    loaded = load_base(base, device="cpu")
    forward = BlockForward(loaded, ("final",), block_tokens=64, batch_tokens=64)
    ids_N = np.arange(64) % 300
    rows_S2 = np.array([[0, 20], [20, 31], [31, 40]])
    x_NH = forward(ids_N, rows_S2)
    assert forward.check(ids_N, rows_S2, x_NH, 3) < 1e-5
    assert not x_NH["final"][40:].any()
    x_NH["final"][31:40] *= 1.01
    with pytest.raises(NumericsError, match=r"tap final differ by 0\.01"):
        forward.check(ids_N, rows_S2, x_NH, 3)


def test_batches_hold_every_sequence_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 200).tolist()
    batches = plan_batches(lengths, 256)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert lengths[batch[0]] == longest
        assert longest * len(batch) <= 256 or len(batch) == 1
    assert plan_batches([9, 9], 4) == [[0], [1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "int4"}, "Did you mean 'int8'"),
        ({"block_tokens": 63}, "`block_tokens=` must be at least"),
        ({"batch_tokens": 0}, "`batch_tokens=` should be greater"),
        ({"taps": ()}, "`taps=` must name"),
        ({"taps": ("final", "final")}, "each once"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExtractSettings(**{"context": 64, **settings})


class TestOut:
    """A folder that holds something else is neither written to nor removed."""

    def refused(self, corpus: Path, base: Path, out: Path, kind: Any, message: str) -> None:
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        with pytest.raises(kind, match=message):
            run(corpus, base, out)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    def test_a_file_is_refused(self, tmp_path: Path, corpus: Path, base: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match=r"is a file"):
            run(corpus, base, tmp_path / "out")

    def test_a_folder_of_something_else_is_refused(
        self, tmp_path: Path, corpus: Path, base: Path
    ) -> None:
        out = write_documents(tmp_path / "out", 2)
        self.refused(corpus, base, out, OutputError, r"holds something else \(000\.txt, 001")

    def test_a_data_set_with_splits_of_the_same_names_is_refused(
        self, tmp_path: Path, corpus: Path, base: Path
    ) -> None:
        for split in ("train", "dev", "test"):
            write_documents(tmp_path / "out" / split, 1)
        (tmp_path / "out" / ".lock").write_text("")
        self.refused(corpus, base, tmp_path / "out", OutputError, "something else")

    def test_another_zarr_group_is_refused(self, tmp_path: Path, corpus: Path, base: Path) -> None:
        import zarr

        zarr.create_group(tmp_path / "out", zarr_format=3)
        self.refused(corpus, base, tmp_path / "out", CacheError, "not an embedcache cache")

    def test_a_tap_that_the_base_lacks_is_refused(
        self, tmp_path: Path, corpus: Path, base: Path
    ) -> None:
        with pytest.raises(BaseModelError, match=r"3 layers"):
            run(corpus, base, tmp_path / "out", taps=("final", "layer_3"))
        assert not (tmp_path / "out").exists()


def test_the_fast_dtype_is_used_and_another_cpu_continues_in_it(
    tmp_path: Path, corpus: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, exact = tmp_path / "cache", tmp_path / "exact"
    monkeypatch.setattr(plan, "fast_dtype", lambda device: torch.bfloat16)
    run(corpus, base, out)
    run(corpus, base, exact, dtype="float32")
    found = [read_attributes(path).environment["dtype"] for path in (out, exact)]
    assert found == ["bfloat16", "float32"]
    for name in ("train", "dev"):
        low, high = (
            Cache(path).split(name).block(0).x_NH["final"].float() for path in (out, exact)
        )
        error = (low - high).norm() / high.norm()
        assert 1e-4 < error < 0.05
    whole = comparable_tree(out)
    marker = next((out / "commits" / "train").glob("00000001.*.json"))
    for record in json.loads(marker.read_text())["files"]:
        (out / record["path"]).unlink()
    (out / "manifest.json").unlink()
    monkeypatch.setattr(plan, "fast_dtype", lambda device: torch.float32)
    with pytest.raises(OutputError, match="dtype was 'bfloat16', now 'float32'"):
        run(corpus, base, out, dtype="float32")
    summary = run(corpus, base, out)
    assert summary.computed_blocks == 1
    assert comparable_tree(out) == whole


def test_batches_have_few_widths_and_none_exceeds_its_budget(base: Path) -> None:
    loaded = load_base(base, device="cpu", dtype="float32")
    most = loaded.model.config.max_position_embeddings
    widths: list[int] = []

    class Noted(BlockForward):
        def _padded(self, ids_N: Any, rows_S2: Any, width: int) -> torch.Tensor:
            widths.append(width)
            return super()._padded(ids_N, rows_S2, width)

    lengths = [5, 17, 30, 33, 40, 63, 64, 65]
    stops = np.cumsum(lengths)
    rows_S2 = np.stack([stops - lengths, stops], axis=1)
    ids_N = np.arange(stops[-1]) % 300
    found = {}
    for batch_tokens in (64, 256):
        widths.clear()
        forward = Noted(loaded, ("final",), block_tokens=512, batch_tokens=batch_tokens)
        found[batch_tokens] = forward(ids_N, rows_S2)["final"]
        assert max(widths) <= max(most, 65)
        if batch_tokens == 256:
            assert set(widths) <= {32, 64, 96}
        else:  # a sequence that is alone is not padded beyond its budget
            assert sorted(widths)[-2:] == [64, 65]
    torch.testing.assert_close(found[64], found[256], rtol=1e-4, atol=1e-5)
