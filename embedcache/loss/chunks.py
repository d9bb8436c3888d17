"""How many logits exist at a time.

Axes: N positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from embedcache.errors import UsageError
from embedcache.units import format_bytes as bytes_text

LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Default bytes of logits that exist at a time; on a CPU about what its caches hold."""
FREE_SHARE = 0.25
"""Largest share of a GPU's free memory that logits take by default."""
FULL_ROWS = 1024
"""Number of rows below which a matrix product is far from its best speed, on CPUs and GPUs."""
ALIGNMENT = 128
"""Rows and columns are multiples of this, the tile size of matrix kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Sizes of the pieces in which logits are computed.

    Attributes:
        rows: positions at a time.
        columns: tokens at a time.
        bytes: memory of these logits and, if the head is streamed, of two of its tiles.
    """

    rows: int
    columns: int
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.rows:,} positions × {self.columns:,} tokens ({bytes_text(self.bytes)})"

    def of_rows(self, N: int) -> list[slice]:
        """Split N positions into chunks."""
        return split_rows(N, self.rows)

    def of_columns(self, V: int) -> list[slice]:
        """Split V tokens into tiles."""
        return split_rows(V, self.columns)


def plan_chunks(
    N: int,
    V: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    budget: int | None = None,
    streamed_hidden: int = 0,
) -> Chunks:
    """Return chunks of about equal size whose logits take at most ``budget`` bytes.

    All columns are one tile if enough rows fit beside them.

    Args:
        N: number of positions.
        V: number of columns of the softmax.
        dtype: dtype of the head, and so of the logits.
        device: where logits are computed.
        budget: bytes; by default `default_budget`. Runs that should give the same bits need the
            same budget.
        streamed_hidden: H if the head is streamed from host memory: two of its tiles are then
            part of the budget. 0 if it is on the device.

    Raises:
        UsageError: if the budget cannot hold a chunk worth computing.
    """
    budget = default_budget(device) if budget is None else budget
    logit = dtype.itemsize
    if streamed_hidden:
        # As many bytes for a tile's logits as for its weights, if there are as many positions.
        rows = min(N, max(FULL_ROWS, 2 * streamed_hidden))
    else:
        rows = min(N, max(FULL_ROWS, budget // (V * logit)))
    rows = max(1, _even(N, rows))
    column_bytes = logit * (rows + 2 * streamed_hidden)
    columns = min(V, budget // column_bytes)
    if columns < min(V, ALIGNMENT):
        least = column_bytes * min(V, ALIGNMENT)
        raise UsageError(
            f"expected a budget of at least {bytes_text(least)} for the logits of {rows:,} "
            f"positions, found {bytes_text(budget)}. Allow more memory, or use fewer positions."
        )
    columns = _even(V, columns)
    return Chunks(rows=rows, columns=columns, bytes=columns * column_bytes)


def default_budget(device: torch.device) -> int:
    """Return the default bytes of logits: `LOGIT_BYTES`, or less on a GPU that is nearly full."""
    budget = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cuda"])
    if device.type != "cuda":
        return budget
    free = torch.cuda.mem_get_info(device)[0]
    if FREE_SHARE * free < budget:
        # Memory that the allocator keeps unused is free as well; this query takes longer.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(budget, int(FREE_SHARE * free))


def split_rows(total: int, size: int) -> list[slice]:
    """Split a range into slices of one size; the last one may be smaller.

    >>> split_rows(5, 3)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]


def _even(total: int, most: int) -> int:
    """Return a size of at most ``most``, aligned if possible, that splits into equal parts."""
    if most >= total:
        return total
    size = math.ceil(total / math.ceil(total / most))
    aligned = math.ceil(size / ALIGNMENT) * ALIGNMENT
    if aligned <= most:
        return aligned
    return most // ALIGNMENT * ALIGNMENT or most
