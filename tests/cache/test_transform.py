"""The transform codec compared with plain linear algebra; its calibration, with its targets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import write_corpus
from support.fixtures_extract import corpus_config, small_settings

from embedcache.base.forward import BlockForward
from embedcache.base.head import Head
from embedcache.cache.cache import Cache
from embedcache.cache.calibration import load_calibration, save_calibration
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.transform import Calibration, TransformCodec
from embedcache.cache.format.layout import CODEC, ExtractSettings
from embedcache.errors import CacheError, UsageError
from embedcache.extraction import calibrate as calibrate_module
from embedcache.extraction import calibrate_cache
from embedcache.extraction.calibrate import Sample, calibrate, coded_bits, rise
from embedcache.extraction.extract import extract
from embedcache.extraction.pipeline import Pipeline

H, V, N = 24, 50, 4096


@pytest.fixture(scope="module")
def embedding_VH() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture(scope="module")
def sample(embedding_VH: torch.Tensor) -> Sample:
    """Correlated rows, each partly predicted by its token."""
    draw = torch.Generator().manual_seed(0)
    ids_N = torch.randint(V, (N,), generator=draw)
    mix_HH = torch.randn(H, H, generator=draw) * torch.logspace(0, -2, H)
    x_NH = torch.randn(N, H, generator=draw) @ mix_HH + 2 * embedding_VH[ids_N].float() + 3
    p_NV = (0.3 * x_NH @ embedding_VH.float().T).softmax(dim=-1)
    targets_N = torch.multinomial(p_NV, 1, generator=draw).squeeze(1)
    targets_N[::7] = -1
    return Sample(x_NH, ids_N.numpy(), targets_N.numpy(), np.arange(N) // 256)


@pytest.fixture(scope="module")
def head(embedding_VH: torch.Tensor) -> Head:
    return Head(0.3 * embedding_VH.float())


@pytest.mark.parametrize("bits", [0.5, 1.5, 4.0])
def test_the_step_meets_the_budget_of_bits(sample, embedding_VH, head, bits) -> None:
    found = calibrate(sample, embedding_VH, head=head, bits=bits)
    codec = TransformCodec(found, embedding_VH)
    q_NH = codec.encode(sample.x_NH, sample.ids_N)["embeddings"].numpy()
    coded = 8 * len(CODERS["pco"].encode(q_NH)) / q_NH.size
    # The budget is met on held-out rows; a file of all rows is within a few per cent of it.
    assert found.measured["bits"] == pytest.approx(bits, rel=0.02)
    assert coded == pytest.approx(bits, rel=0.12)


def test_decoding_follows_the_formula(sample, embedding_VH, head) -> None:
    found = calibrate(sample, embedding_VH, head=head, bits=3.0)
    codec = TransformCodec(found, embedding_VH)
    stored = codec.encode(sample.x_NH, sample.ids_N)
    q_NH = stored["embeddings"].double().numpy()
    e_NH = embedding_VH.double().numpy()[sample.ids_N]
    e_NH /= np.linalg.norm(e_NH, axis=1, keepdims=True)
    parts = {
        name: getattr(found, name).double().numpy()
        for name in ("mean_H", "centre_H", "predictor_HH", "inverse_HH")
    }
    b_NH = parts["mean_H"] + (e_NH - parts["centre_H"]) @ parts["predictor_HH"]
    expected_NH = b_NH + found.step * q_NH @ parts["inverse_HH"]
    decoded_NH = codec.decode(stored, sample.ids_N).double().numpy()
    np.testing.assert_allclose(decoded_NH, expected_NH, rtol=2**-8, atol=1e-4)
    # Encoding rounds: no coefficient is off by more than half a step.
    y_NH = (sample.x_NH.double().numpy() - b_NH) @ np.linalg.inv(parts["inverse_HH"])
    assert np.abs(y_NH / found.step - q_NH).max() < 0.5 + 1e-3


def test_a_batch_decodes_as_its_rows(sample, embedding_VH, head) -> None:
    codec = TransformCodec(calibrate(sample, embedding_VH, head=head, bits=3.0), embedding_VH)
    stored = codec.encode(sample.x_NH[:12], sample.ids_N[:12])["embeddings"]
    rows = codec.decode({"embeddings": stored}, sample.ids_N[:12])
    batch = codec.decode({"embeddings": stored.view(3, 4, H)}, sample.ids_N[:12].reshape(3, 4))
    assert torch.equal(batch.flatten(0, 1), rows)


def test_what_the_token_predicts_is_not_coded(sample, embedding_VH, head) -> None:
    """Shuffled ids predict nothing: at the same rate the error must be much higher."""
    found = calibrate(sample, embedding_VH, head=head, bits=2.0)
    shuffled = replace(sample, ids_N=np.roll(sample.ids_N, 1))
    other = calibrate(shuffled, embedding_VH, head=head, bits=2.0)

    def error(calibration: Calibration, rows: Sample) -> float:
        codec = TransformCodec(calibration, embedding_VH)
        decoded = codec.decode(codec.encode(rows.x_NH, rows.ids_N), rows.ids_N).float()
        return float((decoded - rows.x_NH).square().mean())

    assert error(found, sample) < 0.7 * error(other, shuffled)


def test_components_are_decorrelated_in_order_of_variance(sample, embedding_VH) -> None:
    found = calibrate(sample, embedding_VH, head=None, bits=4.0)
    y_NH = TransformCodec(found, embedding_VH).coefficients(sample.x_NH, sample.ids_N).double()
    covariance = torch.cov(y_NH.T)
    variance = covariance.diagonal()
    assert (variance[1:] < variance[:-1] * 1.2).all()
    correlation = covariance / (variance[:, None] * variance).sqrt()
    assert (correlation - torch.eye(H)).abs().max() < 0.15
    # Without a head the metric is plain: the transform keeps lengths.
    assert torch.allclose(
        found.inverse_HH.float() @ found.inverse_HH.float().T, torch.eye(H) / 1.0, atol=0.05
    )


def test_the_head_s_metric_lowers_the_rise(sample, embedding_VH) -> None:
    """At one rate, errors weighted by their effect on the logits cost the base less."""
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(5))
    head = Head(weight * torch.logspace(0.5, -1.5, H))
    seen = calibrate(sample, embedding_VH, head=head, bits=1.5)
    plain = calibrate(sample, embedding_VH, head=None, bits=1.5)
    plain_rise = rise(plain, sample, embedding_VH, head)
    assert rise(seen, sample, embedding_VH, head) < 0.8 * plain_rise


def test_the_metric_is_the_fisher_information_of_the_logits(sample, head, monkeypatch) -> None:
    """Compared with its definition, row by row in float64; over several tiles of the head."""
    monkeypatch.setattr(calibrate_module, "HEAD_TILE", 16)
    some = sample.rows(np.arange(N) < 600)
    W_VH = head.weight_VH.double()
    expected_HH = torch.zeros(H, H, dtype=torch.float64)
    for x_H in some.x_NH.double():
        p_V = (W_VH @ x_H).softmax(dim=0)
        expected_HH += W_VH.T @ (p_V.diag() - p_V[:, None] * p_V) @ W_VH
    expected_HH /= expected_HH.diagonal().mean()
    expected_HH += calibrate_module.ISOTROPIC * torch.eye(H)
    found_HH = calibrate_module._metric(some, head)
    torch.testing.assert_close(found_HH, expected_HH, rtol=1e-4, atol=1e-5)


def test_quality_is_reached_with_the_coarsest_step(sample, embedding_VH, head) -> None:
    found = calibrate(sample, embedding_VH, head=head, bits=None, quality=0.05)
    assert 0.02 < found.measured["rise"] <= 0.05 + 1e-4
    finer = calibrate(sample, embedding_VH, head=head, bits=None, quality=0.01)
    assert finer.step < found.step
    assert finer.measured["bits"] > found.measured["bits"]


def test_coded_bits_are_those_of_the_coder(sample) -> None:
    q_NH = (sample.x_NH / 0.5).round().to(torch.int16).numpy()
    assert coded_bits(sample.x_NH, 0.5) == 8 * len(CODERS["pco"].encode(q_NH)) / q_NH.size


def test_a_calibration_is_the_same_after_loading(
    sample, embedding_VH, head, tmp_path: Path
) -> None:
    found = calibrate(sample, embedding_VH, head=head, bits=1.5)
    save_calibration(zarr.create_group(tmp_path / CODEC / "final", zarr_format=3), found)
    loaded = load_calibration(tmp_path, "final")
    for name in ("mean_H", "centre_H", "predictor_HH", "inverse_HH"):
        assert torch.equal(getattr(found, name), getattr(loaded, name))
    assert (loaded.step, loaded.measured) == (found.step, found.measured)
    assert torch.equal(loaded.forward_HH, found.forward_HH)


def test_each_tap_has_its_own_calibration_and_train_is_near_the_lossless(caches) -> None:
    lossy, exact = Cache(caches["transform"]), Cache(caches["bf16"])
    for tap in ("final", "layer_1"):
        error, total = 0.0, 0.0
        for number in range(exact.split("train").manifest.blocks):
            x_NH = exact.split("train").block(number).x_NH[tap].float()
            decoded_NH = lossy.split("train").block(number).x_NH[tap].float()
            error += (x_NH - decoded_NH).square().sum().item()
            total += (x_NH - x_NH.mean(dim=0)).square().sum().item()
        assert 0.001 < error / total < 0.3
    first, second = (load_calibration(caches["transform"], t) for t in ("final", "layer_1"))
    assert first.step != second.step


def test_a_cache_without_its_calibration_is_refused(caches, tmp_path: Path) -> None:
    cache = shutil.copytree(caches["transform"], tmp_path / "cache")
    shutil.rmtree(cache / CODEC)
    with pytest.raises(CacheError, match="codec"):
        Cache(cache).split("train").block(0)


def test_a_lost_calibration_is_not_made_again_under_coded_blocks(
    tiny_base, corpus, caches, tmp_path: Path
) -> None:
    cache = shutil.copytree(caches["transform"], tmp_path / "cache")
    (cache / "manifest.json").unlink()
    shutil.rmtree(cache / CODEC)
    marker = next((cache / "commits" / "train").glob("*.json"))
    marker.unlink()
    settings = small_settings(codec="transform", taps=("final", "layer_1"))
    with pytest.raises(CacheError, match=r"blocks were encoded with it"):
        extract(
            corpus_config(corpus), base=str(tiny_base), out=cache, settings=settings, device="cpu"
        )


def extract_many(tiny_base: Path, place: Path, **sizes: int) -> None:
    """Extract 200 documents into ``place``/c."""
    extract(
        corpus_config(write_corpus(place / "many", 200)),
        base=str(tiny_base),
        out=place / "c",
        settings=small_settings(codec="transform", **sizes),
        device="cpu",
    )


def test_batches_of_the_sample_are_not_computed_twice(
    tiny_base, tmp_path: Path, monkeypatch
) -> None:
    computed: list[bytes] = []
    begun: list[int] = []
    batch, run = BlockForward.batch, Pipeline.run

    def noted(self, ids_N, rows_B2):
        computed.append(b"".join(ids_N[a:b].tobytes() for a, b in rows_B2.tolist()))
        return batch(self, ids_N, rows_B2)

    monkeypatch.setattr(BlockForward, "batch", noted)
    monkeypatch.setattr(
        Pipeline, "run", lambda self, *given: (begun.append(len(computed)), run(self, *given))[1]
    )
    extract_many(tiny_base, tmp_path, batch_tokens=128)
    before, after = set(computed[: begun[0]]), computed[begun[0] :]
    assert len(before) > 4
    assert after
    assert not before.intersection(after)


def test_a_second_run_writes_the_same_bytes(tiny_base, corpus, caches, tmp_path: Path) -> None:
    settings = small_settings(codec="transform", taps=("final", "layer_1"))
    extract(
        corpus_config(corpus),
        base=str(tiny_base),
        out=tmp_path / "c",
        settings=settings,
        device="cpu",
    )
    assert Cache(tmp_path / "c").manifest.hash == Cache(caches["transform"]).manifest.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codec": "bf16", "bits": 1.5},
            r"`bits=` needs `codec=` to be 'transform', found 'bf16'",
        ),
        ({"codec": "transform", "bits": 0.0}, r"`bits=` .* 0\.05, found 0"),
        ({"codec": "transform", "quality": -1.0}, r"`quality=` .* greater than 0, found -1"),
        ({"codec": "transform", "bits": 1.0, "quality": 0.1}, "found both"),
        (
            {"codec": "transform", "quality": 0.1, "taps": ("layer_1",)},
            "needs the tap 'final'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        ExtractSettings(**changes)


@pytest.mark.parametrize(
    ("rows", "parts", "batch_tokens"),
    [
        (1024, 16, 64),
        pytest.param(4096, 16, 64, marks=pytest.mark.slow),
        pytest.param(1024, 16, 128, marks=pytest.mark.slow),
    ],
)
def test_the_sample_is_some_rows_of_many_places(
    tiny_base, tmp_path: Path, monkeypatch, rows, parts, batch_tokens
) -> None:
    """Sixteen batches or more are looked at, however few rows are wanted; else the whole split."""
    samples: list[Sample] = []
    real = calibrate_cache.calibrate

    def noted(sample, *given, **more):
        samples.append(sample)
        return real(sample, *given, **more)

    monkeypatch.setattr(calibrate_cache, "calibrate", noted)
    monkeypatch.setattr(calibrate_cache, "SAMPLE_ROWS", rows)
    extract_many(tiny_base, tmp_path, batch_tokens=batch_tokens, block_tokens=128)
    (sample,) = samples
    train = Cache(tmp_path / "c").split("train")
    exact = {
        (int(token), int(following))
        for number in range(train.manifest.blocks)
        for token, following in pairwise(train.tokens(number)[0])
    }
    wanted = sample.targets_N >= 0
    pairs = zip(sample.ids_N[wanted].tolist(), sample.targets_N[wanted].tolist(), strict=True)
    assert set(pairs) <= exact
    assert len(set(sample.part_N.tolist())) >= parts
    assert len(sample.ids_N) <= rows + 64
    held_N = sample.held_out()
    assert 0.1 < held_N.mean() < 0.4
    assert not set(sample.part_N[held_N].tolist()) & set(sample.part_N[~held_N].tolist())


def test_rows_that_are_not_used_cost_nothing(sample, embedding_VH, head) -> None:
    found = calibrate(sample, embedding_VH, head=head, bits=1.5)
    used = TransformCodec(found, embedding_VH).encode(sample.x_NH[:300], sample.ids_N[:300])
    q_NH = used["embeddings"].numpy()
    padded = np.concatenate([q_NH, np.zeros((700, H), np.int16)])
    data = CODERS["pco"].encode(padded)
    assert len(data) == len(CODERS["pco"].encode(q_NH))
    out = np.full_like(padded, 7)
    CODERS["pco"].decode(data, out)
    assert np.array_equal(out, padded)


def test_a_block_s_unused_rows_are_stored_as_zeros(caches) -> None:
    group = zarr.open(caches["transform"], mode="r")
    split = Cache(caches["transform"]).split("train")
    unused = 0
    for number in range(split.manifest.blocks):
        rows = len(split.tokens(number)[0])
        for tap in split.taps:
            block = group[f"train/embeddings/{tap}"][number * 256 : (number + 1) * 256]
            assert block[:rows].any()
            assert not block[rows:].any()
            unused += len(block[rows:])
    assert unused


def test_rows_that_are_all_alike_are_coded(embedding_VH, head) -> None:
    """Nothing varies: no division by a deviation of zero."""
    ids_N, none_N = np.full(64, 7), np.full(64, -1)
    alike = Sample(torch.ones(64, H), ids_N, none_N, np.arange(64) // 8)
    found = calibrate(alike, embedding_VH, head=head, bits=1.5)
    assert "rise" not in found.measured
    codec = TransformCodec(found, embedding_VH)
    decoded = codec.decode(codec.encode(alike.x_NH, ids_N), ids_N)
    assert torch.equal(decoded, torch.ones(64, H, dtype=torch.bfloat16))
