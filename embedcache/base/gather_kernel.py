"""A Triton kernel that gathers rows of pinned host memory.

Axes: V rows of the matrix, H hidden, N rows gathered.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Values that a program reads at a time."""


def gather_pinned(matrix_VH: Tensor, index_N: Tensor) -> Tensor:
    """Return ``matrix_VH[index_N]`` on the GPU of ``index_N``; the matrix is contiguous."""
    N, H = len(index_N), matrix_VH.shape[1]
    rows_NH = torch.empty(N, H, dtype=matrix_VH.dtype, device=index_N.device)
    if N:
        with torch.cuda.device_of(index_N):  # Triton launches on the current device.
            _gather[(N,)](matrix_VH, index_N, rows_NH, H, BLOCK=BLOCK, num_warps=4)
    return rows_NH


@triton.jit
def _gather(matrix, index, rows, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(index + row).to(tl.int64)
    for first in range(0, hidden, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < hidden
        value = tl.load(matrix + place * hidden + column, mask=inside)
        tl.store(rows + row * hidden + column, value, mask=inside)
