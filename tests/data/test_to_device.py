"""Batches are made again when the device is out of memory."""

from __future__ import annotations

import pytest
import torch

from embedcache.data import to_device
from embedcache.data.to_device import ToDevice


@pytest.mark.parametrize(("retry", "failures", "made"), [(False, 1, False), (True, 5, True)])
def test_a_part_is_tried_again_when_the_device_is_out_of_memory(monkeypatch, retry, failures, made):
    monkeypatch.setattr(to_device, "RETRY_SECONDS", 0.0)
    maker = ToDevice({}, torch.device("cpu"), lambda batch: batch, retry=retry)
    tries = []

    def out_of_memory(packed):
        tries.append(packed)
        if len(tries) <= failures:
            raise torch.OutOfMemoryError
        return packed

    monkeypatch.setattr(maker, "_make_on_stream", out_of_memory)
    if made:
        assert maker._make_retrying("part") == "part"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            maker._make_retrying("part")
    assert tries == ["part"] * (failures + made)
