"""How many logits exist at a time.

Axes: N positions, R rows (positions) of a chunk, V vocabulary, C columns of a tile, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from embedcache.errors import UsageError
from embedcache.units import size as bytes_text

LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Bytes of logits held at a time, by default: on a CPU about what its caches hold."""
FREE_SHARE = 0.25
"""Of a GPU's free memory, the most that logits take by default."""
FULL_ROWS = 1024
"""Rows below which a matrix product is far from its best speed, on CPUs and GPUs alike."""
ALIGNMENT = 128
"""Rows and columns are multiples of this: a matrix kernel's own tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Logits are computed for ``rows`` positions and ``columns`` tokens at a time.

    ``bytes`` is what that takes: the logits and, where the head is streamed, two of its tiles.
    """

    rows: int
    columns: int
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.rows:,} positions × {self.columns:,} tokens ({bytes_text(self.bytes)})"

    def of_rows(self, N: int) -> list[slice]:
        """Cut N positions into chunks."""
        return split_rows(N, self.rows)

    def of_columns(self, V: int) -> list[slice]:
        """Cut V tokens into tiles."""
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
    """Return chunks of N positions and V tokens whose logits take at most ``budget`` bytes.

    The whole vocabulary is one tile where enough rows fit beside it; chunks are about equal.

    Args:
        N: positions of a batch.
        V: columns of the softmax.
        dtype: of the head, and so of the logits.
        device: where they are computed.
        budget: bytes; by default `default_budget`. A run that should give the same bits as
            another passes the same one.
        streamed_hidden: H where the head is streamed from host memory, whose two tiles in flight
            are then within the budget; 0 where it is on the device.

    Raises ``UsageError`` if the budget cannot hold a chunk worth computing.
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
            f"the logits of {rows:,} positions need a budget of at least {bytes_text(least)}; "
            f"found {bytes_text(budget)}. Give more memory, or fewer positions a step."
        )
    columns = _even(V, columns)
    return Chunks(rows=rows, columns=columns, bytes=columns * column_bytes)


def default_budget(device: torch.device) -> int:
    """Return the bytes of logits held at a time where nobody says: less on a GPU nearly full."""
    budget = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cuda"])
    if device.type != "cuda":
        return budget
    free = torch.cuda.mem_get_info(device)[0]
    if FREE_SHARE * free < budget:
        # What the allocator holds and nobody uses is free, too; to ask it takes longer.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(budget, int(FREE_SHARE * free))


def split_rows(total: int, size: int) -> list[slice]:
    """Cut a range into slices of a size, the last one smaller.

    >>> split_rows(5, 3)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return [slice(start, min(start + size, total)) for start in range(0, total, max(1, size))]


def _even(total: int, most: int) -> int:
    """Return the size, at most ``most`` and aligned if it can be, that cuts into equal parts."""
    if most >= total:
        return total
    size = math.ceil(total / math.ceil(total / most))
    aligned = math.ceil(size / ALIGNMENT) * ALIGNMENT
    if aligned <= most:
        return aligned
    return most // ALIGNMENT * ALIGNMENT or most
