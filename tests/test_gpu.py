"""Both stages on a GPU: every codec, one carry-on and several stacked."""

from __future__ import annotations

import pytest
from conftest import make_world

from embedcache.cache.verify import verify
from embedcache.carryon.config import CarryOnConfig
from embedcache.evaluate import evaluate
from embedcache.train import sweep, train
from embedcache.training.config import TrainConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codec", ["bf16", "int8", "transform"])
def test_a_gpu_extracts_trains_and_evaluates_with_every_codec(tmp_path, codec):
    world = make_world(tmp_path / "gpu", codec=codec, documents=48, device="cuda")
    on_cpu = make_world(tmp_path / "cpu", documents=48)
    assert not verify(world.cache_path, deep=True).faults
    for split in ("dev", "train"):
        ours, exact = (one.cache().split(split).block(0, None) for one in (world, on_cpu))
        x, reference = ours.x_NH["final"].float(), exact.x_NH["final"].float()
        error = (x - reference).norm() / reference.norm()
        assert error < (0.05 if split == "dev" or codec == "bf16" else 0.5)
    config = TrainConfig(carryon=CarryOnConfig(width=32), epochs=2, loss="exact")
    summary = train(world.cache_path, out=tmp_path / "one", config=config, device="cuda")
    assert summary.best_dev is not None and summary.base_dev is not None
    assert summary.best_dev < summary.base_dev
    found = evaluate(tmp_path / "one", world.cache_path, device="cuda")
    host = evaluate(tmp_path / "one", world.cache_path, device="cpu")
    assert found.rows[0]["cross_entropy"] == pytest.approx(host.rows[0]["cross_entropy"], rel=0.01)


@pytest.mark.parametrize("loss", ["exact", "shortlist"])
def test_those_stacked_on_a_gpu_come_to_what_each_does_alone(tmp_path, world, loss):
    runs = {
        tmp_path / str(seed): TrainConfig(
            carryon=CarryOnConfig(width=32), epochs=2, seed=seed, loss=loss
        )
        for seed in range(3)
    }
    stacked = sweep(world.cache_path, runs=runs, device="cuda")
    for seed, result in enumerate(stacked):
        out = tmp_path / f"alone{seed}"
        alone = train(world.cache_path, out=out, config=result.config, device="cuda")
        assert result.failure is None and result.summary is not None
        assert result.summary.best_dev == pytest.approx(alone.best_dev, rel=2e-3)
