"""Rows of a matrix of the base, on the device that computes, wherever the matrix lies.

Axes: V rows of the matrix, H hidden, N rows wanted.
"""

from __future__ import annotations

from torch import Tensor

from embedcache.device import has_triton


def rows_of(matrix_VH: Tensor, index_N: Tensor) -> Tensor:
    """Return ``matrix_VH[index_N]`` on the device of the index.

    A GPU reads the rows of a matrix in pinned host memory by itself, at the speed of the bus and
    without waiting for the host; others are gathered on the host first, and copied.
    """
    device = index_N.device
    if matrix_VH.device == device:
        return matrix_VH.index_select(0, index_N)
    if device.type == "cuda" and matrix_VH.is_pinned() and has_triton():
        from embedcache.base.gather_kernel import gathered

        return gathered(matrix_VH, index_N)
    rows_NH = matrix_VH[index_N.to(matrix_VH.device)]
    if device.type == "cuda":
        rows_NH = rows_NH.pin_memory()
    return rows_NH.to(device, non_blocking=True)
