"""Rows gathered from a matrix on the same device, on the host or in pinned host memory."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from embedcache.base.gather import gather_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("home", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("shape", [(50, 5), (50, 3000), (50, 1)])
def test_rows_arrive_on_the_device_of_the_index(home, device, pinned, shape):
    if pinned and (home, device) != ("cpu", "cuda"):
        pytest.skip("only a copy from host to GPU uses pinned memory")
    if (home, device) == ("cuda", "cpu"):
        pytest.skip("not supported")
    matrix = torch.randn(shape).to(home, torch.bfloat16)
    index = torch.tensor([3, 0, 49, 3])
    found = gather_rows(matrix.pin_memory() if pinned else matrix, index.to(device))
    assert found.device.type == device
    assert torch.equal(found.cpu(), matrix.cpu()[index])
    assert gather_rows(matrix, index[:0].to(device)).shape == (0, shape[1])


def test_the_kernel_equals_indexing():
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 python -m pytest tests/base/test_gather.py")
    kernel = importlib.import_module("embedcache.base.gather_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix, index = torch.randn(20, 2100, device=device), torch.tensor([19, 0, 7], device=device)
    assert torch.equal(kernel.gather_pinned(matrix, index), matrix[index])
