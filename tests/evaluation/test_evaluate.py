"""Evaluation against cross-entropies computed with transformers' own logits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World, make_world, random_carryon
from torch.nn import functional as F

from embedcache.base.load import Base
from embedcache.carryon.saving import load_carryon
from embedcache.compose.model import compose
from embedcache.corpus.config import CorpusConfig
from embedcache.errors import CacheError, IdentityError
from embedcache.evaluation.evaluate import evaluate
from embedcache.evaluation.live import evaluate_cache_live, evaluate_corpus
from embedcache.evaluation.scores import Scores, summarise, with_base

ALPHAS = (0.5, 1.0)
BF16 = 5e-3
"""Nats a token between lossless-in-bfloat16 embeddings (8 bits of mantissa) and float32 ones."""
INT8 = 2e-2
"""The same for train stored as int8."""


@pytest.fixture(params=["llama", "gemma3_text"])
def case(request, world, tapped, tmp_path) -> tuple[World, Path]:
    if request.param == "llama":
        return world, random_carryon(world, tmp_path / "c")
    shape = {"taps": ("final", "layer_1"), "token_input": True}
    return tapped, random_carryon(tapped, tmp_path / "c", **shape)


@torch.no_grad()
def by_document(world: World, base: Base, split: str) -> dict[int, list[float]]:
    """Summed loss and targets of each document, one sequence at a time, by the model's logits."""
    reader, found = world.cache().split(split), {}
    for number in range(reader.manifest.blocks):
        ids_N, mask_N = reader.tokens(number)
        _, rows_S2, document_S = reader.sequences(number)
        for document, (a, b) in zip(document_S.tolist(), rows_S2.tolist(), strict=True):
            ids = torch.from_numpy(ids_N[a:b])
            mask = torch.from_numpy(mask_N[a:b])[1:].bool()
            logits = base.model(ids[None]).logits[0, :-1].double()
            sums = found.setdefault(document, [0.0, 0])
            sums[0] += F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum").item()
            sums[1] += int(mask.sum())
    return found


def mean(found: dict[int, list[float]]) -> float:
    return sum(loss for loss, _ in found.values()) / sum(count for _, count in found.values())


def check(found, expected: dict[float, dict[int, list[float]]], tolerance: float) -> None:
    assert found.targets == sum(count for _, count in expected[0.0].values())
    assert found.documents == len(expected[0.0])
    assert math.isclose(found.base_cross_entropy, mean(expected[0.0]), abs_tol=tolerance)
    assert math.isclose(found.base_perplexity, math.exp(found.base_cross_entropy))
    assert [row["alpha"] for row in found.rows] == list(ALPHAS)
    for row in found.rows:
        value = mean(expected[row["alpha"]])
        assert math.isclose(row["cross_entropy"], value, abs_tol=tolerance)
        assert math.isclose(row["difference"], value - mean(expected[0.0]), abs_tol=tolerance)
        assert row["low"] <= row["difference"] <= row["high"]
        assert abs(row["difference"]) > 5 * tolerance  # the carry-on did something


def expected(world: World, carryon: Path, split: str) -> dict[float, dict[int, list[float]]]:
    found = {0.0: by_document(world, world.base(), split)}
    with compose(world.base(), carryon) as composed:
        base = replace(world.base(), model=composed.model)
        for alpha in ALPHAS:
            composed.alpha = alpha
            found[alpha] = by_document(world, base, split)
    return found


def test_from_the_cache_and_live_equal_the_models_logits(case):
    world, carryon = case
    truth = expected(world, carryon, "test")
    check(evaluate(carryon, world.cache_path, alphas=ALPHAS, device="cpu"), truth, BF16)
    live = evaluate_cache_live(world.base(), carryon, world.cache_path, alphas=ALPHAS)
    check(live, truth, 1e-4)
    assert live.live


def test_every_document_has_its_own_sum(world, tmp_path):
    carryon = random_carryon(world, tmp_path / "c")
    truth = expected(world, carryon, "test")
    keep: list[Scores] = []
    import embedcache.evaluation.cached as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module,
            "summarise",
            lambda scores, **rest: keep.append(scores) or summarise(scores, **rest),
        )
        evaluate(carryon, world.cache_path, alphas=ALPHAS, device="cpu")
    (scores,) = keep
    for row, alpha in enumerate(scores.alphas):
        for document, (loss, count) in truth[alpha].items():
            assert scores.targets_D[document] == count
            assert math.isclose(scores.loss_AD[row, document], loss, abs_tol=5 * BF16 * count)
    assert scores.targets_D.sum() == sum(count for _, count in truth[0.0].values())


def test_int8_is_near(tmp_path):
    world = make_world(tmp_path / "w", codec="int8")
    carryon = random_carryon(world, tmp_path / "c")
    truth = expected(world, carryon, "train")
    found = evaluate(carryon, world.cache_path, split="train", alphas=ALPHAS, device="cpu")
    check(found, truth, INT8)
    # and it is the codec, not luck: the lossless split is nearer
    test = evaluate(carryon, world.cache_path, alphas=ALPHAS, device="cpu")
    check(test, expected(world, carryon, "test"), BF16)


def test_a_corpus_gives_what_its_cache_gives(world, tmp_path):
    """All splits together are the corpus."""
    carryon = random_carryon(world, tmp_path / "c")
    corpus = CorpusConfig(
        sources=(str(world.corpus),), context=64, dev_fraction=0.0, test_fraction=0.0
    )
    found = evaluate_corpus(world.base(), carryon, corpus)
    parts = [
        evaluate_cache_live(world.base(), carryon, world.cache_path, split=split)
        for split in ("train", "dev", "test")
    ]
    assert found.targets == sum(part.targets for part in parts)
    assert found.documents == sum(part.documents for part in parts) == 24
    together = sum(p.rows[0]["cross_entropy"] * p.targets for p in parts) / found.targets
    assert math.isclose(found.rows[0]["cross_entropy"], together, abs_tol=1e-4)


def test_what_does_not_belong_together_is_refused(world, tapped, tmp_path):
    carryon = random_carryon(world, tmp_path / "c")
    with pytest.raises(IdentityError, match=str(tapped.cache_path)):
        evaluate(carryon, tapped.cache_path, device="cpu")
    with pytest.raises(IdentityError, match=str(tapped.cache_path)):
        evaluate_cache_live(world.base(), carryon, tapped.cache_path)
    with pytest.raises(CacheError, match="no 'validation' split"):
        evaluate(carryon, world.cache_path, split="validation", device="cpu")


def test_a_fresh_carry_on_changes_nothing(world, tmp_path):
    folder = random_carryon(world, tmp_path / "c")
    model, record = load_carryon(folder)
    torch.nn.init.zeros_(model.branch.weight)
    from embedcache.carryon.saving import save_carryon

    save_carryon(folder, model, record)
    found = evaluate(folder, world.cache_path, device="cpu")
    assert found.rows[0]["cross_entropy"] == found.base_cross_entropy
    assert (found.rows[0]["difference"], found.rows[0]["low"], found.rows[0]["high"]) == (0, 0, 0)


def test_alphas_come_once_with_the_base_first():
    assert with_base((1.0, 0.5, 1.0, 0.0)) == (0.0, 1.0, 0.5)
    assert with_base((0.0,)) == (0.0,)


# --- the interval


def scores(change_D: np.ndarray, targets_D: np.ndarray) -> Scores:
    base = np.full(len(change_D), 3.0) * targets_D
    return Scores((0.0, 1.0), np.stack([base, base + change_D * targets_D]), targets_D)


def documents(count: int, seed: int = 0, shift: float = 0.0) -> Scores:
    draw = np.random.default_rng(seed)
    return scores(draw.normal(shift, 1.0, count), draw.integers(50, 150, count))


@pytest.mark.parametrize("count", [5, 40, 300])
def test_the_interval_holds_its_mean_and_is_repeatable(count):
    found = documents(count).difference(1.0)
    assert found.low < found.value < found.high
    assert documents(count).difference(1.0) == found


def test_the_interval_shrinks_with_the_root_of_the_documents():
    widths = [
        (lambda d: d.high - d.low)(documents(count, seed=3).difference(1.0)) for count in (50, 800)
    ]
    assert 2.8 < widths[0] / widths[1] < 5.6


def test_a_constant_shift_excludes_zero():
    found = scores(np.full(9, -0.2), np.arange(10, 100, 10)).difference(1.0)
    assert math.isclose(found.value, -0.2)
    assert math.isclose(found.low, -0.2)
    assert math.isclose(found.high, -0.2)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    inside = 0
    for seed in range(150):
        found = documents(60, seed=seed, shift=0.4).difference(1.0, samples=300)
        inside += found.low <= 0.4 <= found.high
    assert 0.88 <= inside / 150 <= 0.99


def test_documents_weigh_by_their_targets():
    found = scores(np.array([1.0, 0.0]), np.array([1, 99])).difference(1.0)
    assert math.isclose(found.value, 0.01)


def test_a_document_without_targets_is_left_out():
    whole = Scores((0.0, 1.0), np.array([[5.0, 0.0], [4.0, 0.0]]), np.array([5, 0]))
    found = summarise(whole, carryon="c", on="o", split="test", live=False)
    assert (found.documents, found.targets) == (1, 5)
    assert found.rows[0]["difference"] == pytest.approx(-0.2)
