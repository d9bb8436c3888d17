"""The sample of embeddings that a carry-on is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedcache.cache.split_reader import SplitReader
from embedcache.data.sample import sample_embeddings
from embedcache.errors import NumericsError
from embedcache.training.config import TrainConfig
from embedcache.training.train import train


def test_embeddings_that_are_not_finite_are_refused(world, tmp_path, monkeypatch):
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


def test_blocks_without_readable_sequences_are_replaced(world, monkeypatch):
    """The blocks that would have been sampled are quarantined, and not opened."""
    whole, read = SplitReader.block, []
    split = world.cache().split("train")
    blocks = split.manifest.blocks
    drawn = sorted({blocks * i // 4 for i in range(4)})
    assert 4 <= len(drawn) < blocks
    sequences = SplitReader.sequences

    def quarantined(self, number):
        found = sequences(self, number)
        return tuple(part[:0] for part in found) if number in drawn else found

    def opened(self, number, taps=None):
        read.append(number)
        return whole(self, number, taps)

    monkeypatch.setattr(SplitReader, "sequences", quarantined)
    monkeypatch.setattr(SplitReader, "block", opened)
    sample = sample_embeddings(split, ("final",))
    left = [number for number in range(blocks) if number not in drawn]
    assert read == sorted({left[len(left) * i // 4] for i in range(4)})
    assert len(sample["final"]) == sum(
        int(stop - first) for number in read for first, stop in sequences(split, number)[1].tolist()
    )


def test_a_split_without_readable_sequences_is_refused(world, monkeypatch):
    monkeypatch.setattr(
        SplitReader, "sequences", lambda self, number: tuple(np.empty((0, 2), int) for _ in "abc")
    )
    with pytest.raises(NumericsError, match="no readable sequence"):
        sample_embeddings(world.cache().split("train"), ("final",))
