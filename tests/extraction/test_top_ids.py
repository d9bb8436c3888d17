"""Top ids: stored with their cache, and included in shortlists."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from support.fixtures_extract import (
    call_main,
    corpus_config,
    flip_byte,
    small_flags,
    small_settings,
)
from support.fixtures_extract import write_documents as documents
from support.tiny import tiny_base_directory, tiny_tokenizer
from transformers import AutoModelForCausalLM

from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import LIKELY, MOST_TOP_IDS
from embedcache.cache.verify import verify
from embedcache.carryon.branch.config import BranchConfig
from embedcache.data.loader import BatchLoader
from embedcache.editing.append import append
from embedcache.editing.delete import delete
from embedcache.editing.merge import merge
from embedcache.editing.repair import repair as repair_cache
from embedcache.errors import IdentityError, UsageError
from embedcache.extraction import encode
from embedcache.extraction.extract import extract
from embedcache.info import describe
from embedcache.loss import ShortlistSampler
from embedcache.training import inputs as inputs_module
from embedcache.training.config import TrainConfig
from embedcache.training.train import train

K = 3
PATH = "train/head/top_ids"


@pytest.fixture(scope="module", autouse=True)
def likely():
    """A base of random weights finds no token likely: ten times the mean probability is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "LIKELY", 10 / len(tiny_tokenizer()))
        yield


def run(corpus: Path, base: Path, out: Path, device: str = "cpu", **changes: Any) -> Any:
    settings = small_settings(**{"top_ids": K, "taps": ("layer_1", "final")} | changes)
    config, dtype = corpus_config(corpus), "float32"
    return extract(config, base=str(base), out=out, settings=settings, device=device, dtype=dtype)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, session_home: None) -> Path:
    """A folder with a corpus, a base, and a cache that has top ids."""
    root = tmp_path_factory.mktemp("top")
    documents(root / "corpus", 20)
    tiny_base_directory(root / "base", tied=False)
    run(root / "corpus", root / "base", root / "cache", codec="transform")
    return root


@pytest.fixture
def cache(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "cache", tmp_path / "cache")


def plain(cache: Path, split: str = "train") -> np.ndarray[Any, Any]:
    return zarr.open_group(cache, mode="r")[f"{split}/head/top_ids"][:]


def by_tokens(cache: Path) -> dict[bytes, bytes]:
    """Return the top ids of each sequence of all splits, by its tokens."""
    found = {}
    for split in map(Cache(cache).split, ("train", "dev", "test")):
        for number in range(split.manifest.blocks):
            block = split.stored(number, ("final",), top_ids=True)
            for a, b in block.rows_S2.tolist():
                found[block.ids_N[a:b].tobytes()] = block.top_ids_NJ[a:b].tobytes()
    return found


def test_top_ids_are_those_of_transformers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the logits are computed in several parts."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()
    seen = []
    for name in ("train", "dev", "test"):
        split, stored_NK = Cache(place / "cache").split(name), plain(place / "cache", name)
        for number in range(split.manifest.blocks):
            block = split.stored(number, ("final",), top_ids=True)
            assert np.array_equal(block.top_ids_NJ, stored_NK[256 * number :][: len(block.ids_N)])
            for first, stop in block.rows_S2.tolist():
                with torch.no_grad():
                    logits = model(torch.from_numpy(block.ids_N[first:stop])[None]).logits[0]
                probability_NJ, id_NJ = logits.softmax(dim=1).topk(K + 1, dim=1)
                found_NJ = torch.from_numpy(block.top_ids_NJ[first:stop])
                sure = ((probability_NJ[:, :-1] - probability_NJ[:, 1:]) > 1e-6).all(dim=1)
                sure &= ((probability_NJ - encode.LIKELY).abs() > 1e-6).all(dim=1)
                expected = torch.where(probability_NJ >= encode.LIKELY, id_NJ + 1, 0)[:, :K].int()
                assert torch.equal(found_NJ[sure], expected[sure])
                seen.append(found_NJ[sure])
    counts = (torch.cat(seen) > 0).sum(dim=1)
    assert {0, 1, K} <= set(counts.tolist())
    base_NH, head = torch.randn(300, 32), Cache(place / "cache").base_array("head/weight")
    head = encode.Head(head.float())
    whole = encode.top_ids_of(base_NH, head, K)
    monkeypatch.setitem(encode.LOGITS, "cpu", 7 * len(head.weight_VH))
    assert torch.equal(encode.top_ids_of(base_NH, head, K), whole) and whole.any()


def test_unused_rows_have_no_top_ids(place: Path, tmp_path: Path) -> None:
    """Rows after the last sequence, and sequences that are not finite."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    token = tiny_tokenizer().convert_tokens_to_ids("~")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    texts = shutil.copytree(place / "corpus", tmp_path / "corpus")
    (texts / "004.txt").write_text("~ " + (texts / "004.txt").read_text())
    assert run(texts, base, tmp_path / "cache").quarantined == 1
    for name in ("train", "dev", "test"):
        split, stored_NK = Cache(tmp_path / "cache").split(name), plain(tmp_path / "cache", name)
        used = np.zeros(len(stored_NK), bool)
        for number in range(split.manifest.blocks):
            for first, stop in split.sequences(number)[1].tolist():
                used[256 * number + first : 256 * number + stop] = True
        assert not stored_NK[~used].any() and stored_NK[used].any()


def test_a_cache_without_top_ids_has_no_such_array(place: Path, tmp_path: Path) -> None:
    """The cache is otherwise the same."""
    run(place / "corpus", place / "base", tmp_path / "plain", codec="transform", top_ids=0)
    assert not (tmp_path / "plain/train/head").exists()
    split = Cache(tmp_path / "plain").split("train")
    assert split.stored(0, ("final",)).top_ids_NJ is None
    for path in (tmp_path / "plain/train").rglob("c/*"):
        if path.is_file():
            other = place / "cache" / path.relative_to(tmp_path / "plain")
            assert other.read_bytes() == path.read_bytes()


def test_the_bytes_of_top_ids_are_estimated_and_described(place: Path, tmp_path: Path) -> None:
    found = [
        run(place / "corpus", place / "base", tmp_path / str(k), top_ids=k, codec="bf16")
        for k in (0, MOST_TOP_IDS)
    ]
    none, most = (np.array([one.estimated_bytes, one.bytes]) for one in found)
    predicted, real = most - none
    assert predicted == pytest.approx(real, rel=0.15) and real > 1000
    arrays = describe(place / "cache")["arrays"]["train"]
    size = sum(path.stat().st_size for path in (place / "cache" / PATH).rglob("c/*/*"))
    assert arrays["head/top_ids"]["bytes"] >= size > 0


def test_damaged_top_ids_are_found_and_repaired(place: Path, cache: Path) -> None:
    shard = cache / PATH / "c/0/0"
    whole = shard.read_bytes()
    for damage in (flip_byte, Path.unlink):
        damage(shard)
        (fault,) = verify(cache, deep=True).faults
        assert fault.file == f"{PATH}/c/0/0"
        repair_cache(
            cache,
            corpus_config(place / "corpus"),
            base=str(place / "base"),
            settings=small_settings(top_ids=K, taps=("layer_1", "final"), codec="transform"),
            device="cpu",
            dtype="float32",
        )
        assert shard.read_bytes() == whole and not verify(cache, deep=True).faults


def test_the_top_ids_of_a_deleted_document_are_gone(cache: Path) -> None:
    split = Cache(cache).split("train")
    _, rows_S2, document_S = split.sequences(0)
    name = split.documents[int(document_S[0])]
    rows = [range(a, b) for (a, b), d in zip(rows_S2.tolist(), document_S, strict=True) if not d]
    gone = np.concatenate(rows)
    before = plain(cache)
    delete(cache, [name])
    after = plain(cache)
    assert before[gone].any() and not after[gone].any()
    kept = np.setdiff1d(np.arange(len(before)), gone)
    assert np.array_equal(after[kept], before[kept])
    assert not verify(cache, deep=True).faults


def test_merging_and_appending_keep_top_ids(place: Path, cache: Path, tmp_path: Path) -> None:
    more = documents(tmp_path / "more", 8, seed=9)
    one = {"codec": "bf16", "taps": ("final",)}
    for corpus, out in ((place / "corpus", "one"), (more, "two")):
        run(corpus, place / "base", tmp_path / out, **one)
    run(more, place / "base", tmp_path / "none", top_ids=0, **one)
    with pytest.raises(IdentityError, match=f"same `top_ids=`, found {K} in .* and 0 in"):
        merge([tmp_path / "one", tmp_path / "none"], tmp_path / "both")
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    expected = np.concatenate([plain(tmp_path / "one"), plain(tmp_path / "two")])
    assert np.array_equal(plain(tmp_path / "both"), expected)
    append(tmp_path / "one", corpus_config(more), device="cpu")
    assert by_tokens(tmp_path / "one") == by_tokens(tmp_path / "both")
    for path in ("one", "both"):
        assert not verify(tmp_path / path, deep=True).faults


@pytest.mark.parametrize("one_row", [False, True])
def test_a_batch_has_the_top_ids_of_its_predicted_positions(place: Path, one_row: bool) -> None:
    split = Cache(place / "cache").split("train")
    stored = {}
    for number in range(split.manifest.blocks):
        block = split.stored(number, ("final",), top_ids=True)
        for sequence, (a, b) in zip(block.sequence_S, block.rows_S2.tolist(), strict=True):
            stored[int(sequence)] = torch.from_numpy(block.top_ids_NJ[a:b])
    loader = BatchLoader(split, batch_tokens=300, taps=("final",), one_row=one_row, top_ids=True)
    count = 0
    for batch in loader.epoch(0):
        expected = [stored[sequence][place] for sequence, place in batch.source_N2.tolist()]
        assert torch.equal(batch.top_ids_NJ, torch.stack(expected))
        assert any(tensor is batch.top_ids_NJ for tensor in batch.tensors())
        count += len(expected)
    assert count == split.manifest.targets


def test_a_shortlist_includes_top_ids_and_its_sum_stays_unbiased(place: Path) -> None:
    cache = Cache(place / "cache")
    weight = cache.base_array("head/weight").double()
    head, V = encode.Head(weight), len(weight)
    draw = torch.Generator().manual_seed(0)
    x_NH = torch.randn(9, 32, generator=draw, dtype=torch.float64)
    targets_N = torch.randint(V, (9,), generator=draw)
    top_NK = torch.tensor([[4, 0], [0, 0], [V, 7]] * 3, dtype=torch.int32)
    proposal_V = torch.rand(V, generator=draw) + 0.05
    shortlist = ShortlistSampler(head, proposal_V / proposal_V.sum(), samples=12)
    held = {3, 6, V - 1, *targets_N.tolist()}
    logits_NV, totals = head(x_NH), []
    for step in range(600):
        (one,) = shortlist.draw(targets_N, shortlist.generator(step), top_NK)
        chosen = (one.weight_CH[:, None] == weight).all(-1).float().argmax(dim=1)
        real = one.log_weight_C.isfinite()
        chosen, log_weight = chosen[real], one.log_weight_C[real].double()
        assert len(set(chosen.tolist())) == len(chosen) <= len(held) + 12
        assert {*chosen[log_weight == 0].tolist()} >= held
        assert torch.equal(chosen[one.index_N], targets_N)
        totals.append((logits_NV[:, chosen] + log_weight).exp().sum(dim=1))
    totals = torch.stack(totals)
    error = (totals.mean(dim=0) - logits_NV.exp().sum(dim=1)) / (totals.std(dim=0) / 600**0.5)
    assert error.abs().max() < 4.5 and totals.std(dim=0).min() > 0


def test_training_with_few_draws_is_near_training_with_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = Mock(wraps=inputs_module.tail_proposal)
    monkeypatch.setattr(inputs_module, "tail_proposal", proposed)
    monkeypatch.setattr(inputs_module, "DRAWS_BESIDE_TOP_IDS", 20)
    shape = BranchConfig(width=32, blocks=1)
    config = TrainConfig(carryon=shape, epochs=2, batch_tokens=256, lr=5e-3, loss="shortlist")
    draw, seen = ShortlistSampler.draw, []

    def noted(
        self: ShortlistSampler, targets_N: Any, generator: Any, top_ids_NK: Any = None
    ) -> Any:
        seen.append(top_ids_NK is not None)
        return draw(self, targets_N, generator, top_ids_NK)

    monkeypatch.setattr(ShortlistSampler, "draw", noted)
    few = train(place / "cache", out=tmp_path / "few", config=config)
    assert all(seen) and len(seen) > 4  # of train and of dev
    assert proposed.call_args.kwargs == {"held": LIKELY}
    every = train(place / "cache", out=tmp_path / "all", config=replace(config, samples=100_000))
    assert few.best_dev == pytest.approx(every.best_dev, rel=5e-3)
    assert abs(every.shortlist_bias) < 0.1 * abs(few.shortlist_bias) < 0.1


def test_invalid_settings_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    flags = small_flags(place / "corpus", place / "base", tmp_path / "cache")
    for more, said in (
        (
            ["--top-ids", "21"],
            f"--top-ids should be less than or equal to {MOST_TOP_IDS}, found 21",
        ),
        (["--top-ids", "8", "--taps", "layer_1"], "--top-ids needs the tap 'final'"),
    ):
        assert call_main(monkeypatch, *flags, *more) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="found -1"):
        small_settings(top_ids=-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_with_top_ids_gains_what_the_exact_loss_does(
    place: Path, tmp_path: Path, device: str
) -> None:
    run(place / "corpus", place / "base", tmp_path / "cache", device=device, codec="transform")
    alike = (plain(tmp_path / "cache") == plain(place / "cache")).all(axis=1)
    assert alike.mean() > 0.99
    shape = BranchConfig(width=32, blocks=1)
    config = TrainConfig(carryon=shape, epochs=3, batch_tokens=256, lr=5e-3, samples=100)
    shortlist, exact = (
        train(
            tmp_path / "cache",
            out=tmp_path / loss,
            config=replace(config, loss=loss),
            device=device,
        )
        for loss in ("shortlist", "exact")
    )
    gain = exact.base_dev - exact.best_dev
    assert shortlist.base_dev - shortlist.best_dev == pytest.approx(gain, rel=0.1) and gain > 0.1
