"""What a carry-on is calibrated on must be finite."""

from __future__ import annotations

import pytest
import torch

from embedcache.cache.reader import SplitReader
from embedcache.errors import NumericsError
from embedcache.train import train
from embedcache.training.config import TrainConfig


def test_embeddings_that_are_not_finite_are_not_calibrated_on(world, tmp_path, monkeypatch):
    whole = SplitReader.block

    def poisoned(self, number, taps=None):
        block = whole(self, number, taps)
        if number == 0:
            first, last = block.rows_S2[0]
            block.x_NH["final"][first:last] = torch.nan
        return block

    monkeypatch.setattr(SplitReader, "block", poisoned)
    with pytest.raises(NumericsError, match="not finite"):
        train(world.cache_path, out=tmp_path / "out", config=TrainConfig(epochs=1), device="cpu")
    assert not (tmp_path / "out").exists()
