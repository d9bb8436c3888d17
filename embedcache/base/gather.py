"""Gather rows of a matrix that may lie in host memory, such as the base's head.

Axes: V rows of the matrix, H hidden, N rows gathered.
"""

from __future__ import annotations

from torch import Tensor

from embedcache.device import has_triton


def gather_rows(matrix_VH: Tensor, index_N: Tensor) -> Tensor:
    """Return ``matrix_VH[index_N]`` on the device of ``index_N``.

    For a GPU index and a matrix in pinned host memory, a kernel reads the rows over the bus without
    waiting for the host. From other host memory, the rows are gathered on the host and copied.
    """
    device = index_N.device
    if matrix_VH.device == device:
        return matrix_VH.index_select(0, index_N)
    if device.type == "cuda" and matrix_VH.is_pinned() and has_triton():
        from embedcache.base.gather_kernel import gather_pinned

        return gather_pinned(matrix_VH, index_N)
    rows_NH = matrix_VH[index_N.to(matrix_VH.device)]
    if device.type == "cuda":
        rows_NH = rows_NH.pin_memory()
    return rows_NH.to(device, non_blocking=True)
