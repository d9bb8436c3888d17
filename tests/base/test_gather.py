"""Rows of a matrix of the base, wherever it lies."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from embedcache.base.gather import rows_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("home", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("shape", [(50, 5), (50, 3000), (50, 1)])
def test_rows_come_to_the_index_from_wherever_they_lie(home, device, pinned, shape):
    if pinned and (home, device) != ("cpu", "cuda"):
        pytest.skip("only host memory is pinned, for a GPU")
    if (home, device) == ("cuda", "cpu"):
        pytest.skip("nobody asks for that")
    matrix = torch.randn(shape).to(home, torch.bfloat16)
    index = torch.tensor([3, 0, 49, 3])
    found = rows_of(matrix.pin_memory() if pinned else matrix, index.to(device))
    assert found.device.type == device
    assert torch.equal(found.cpu(), matrix.cpu()[index])
    assert rows_of(matrix, index[:0].to(device)).shape == (0, shape[1])


def test_the_kernel_gathers_what_an_index_does():
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 python -m pytest tests/base/test_rows.py")
    gather = importlib.import_module("embedcache.base.gather_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix, index = torch.randn(20, 2100, device=device), torch.tensor([19, 0, 7], device=device)
    assert torch.equal(gather.gathered(matrix, index), matrix[index])
