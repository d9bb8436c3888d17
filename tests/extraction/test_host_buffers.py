"""The ring of host buffers between a device and the coders."""

from __future__ import annotations

import pytest
import torch

from embedcache.extraction.encode import HostBuffers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def block(rows: int, dtype: torch.dtype, device: str, *, scale: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    values = torch.randint(-100, 100, (rows, 24), generator=draw).to(dtype)
    arrays = {"embeddings/final": values.to(device)}
    if scale:
        arrays["scale/final"] = torch.rand(rows, 1, generator=draw).to(device)
    return arrays


@pytest.mark.parametrize("device", DEVICES)
def test_one_buffer_serves_blocks_of_different_arrays_dtypes_and_sizes(device):
    buffers = HostBuffers(torch.device(device), count=1)
    for rows, dtype, scale in (
        (7, torch.int8, True),
        (31, torch.int16, False),
        (3, torch.uint8, True),
        (31, torch.int8, False),
    ):
        arrays = block(rows, dtype, device, scale=scale)
        finite = torch.arange(rows, device=device) % 3 > 0
        slot = buffers.fetch(arrays, finite)()
        assert slot.arrays.keys() == arrays.keys()
        for name, value in arrays.items():
            assert slot.arrays[name].dtype == value.dtype
            assert torch.equal(slot.arrays[name], value.cpu())
        assert torch.equal(slot.finite_N, finite.cpu())
        slot.release()


def test_a_slot_in_use_is_not_written_to_and_a_full_ring_waits():
    buffers = HostBuffers(torch.device("cpu"), count=2)
    first = buffers.fetch(block(5, torch.int8, "cpu", scale=False), torch.ones(5))()
    kept = first.arrays["embeddings/final"].clone()
    second = buffers.fetch(block(6, torch.int8, "cpu", scale=False), torch.ones(6))()
    assert torch.equal(first.arrays["embeddings/final"], kept)
    assert buffers._free.empty()
    second.release()
    third = buffers.fetch(block(4, torch.int8, "cpu", scale=False), torch.ones(4))()
    used = [slot.arrays["embeddings/final"].data_ptr() for slot in (second, third)]
    assert used[0] == used[1]
