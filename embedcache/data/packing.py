"""Packs sequences into the rows of a batch, on the host.

Axes: B rows, T time, H hidden, N predicted positions, M boundaries of sequences, S sequences, J top
ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.split_reader import StoredBlock
from embedcache.data.batch import Counts
from embedcache.units import round_up

Array = np.ndarray[Any, Any]

ROW_MULTIPLE = 64
"""Rows are padded to a multiple of this, so that few shapes occur: the first product of each shape
is slow."""
CU_SEQLENS_MULTIPLE = 64
"""The cu_seqlens of a batch of one row are padded to a multiple of this, or below it to a power of
two, so that few shapes occur. A larger multiple would waste memory: the backward pass of attention
allocates memory for 128 positions per entry."""


class BatchPart(NamedTuple):
    """The sequences of a batch or of a part of one, each as (block, index in the block).

    ``total`` and ``last_part`` are those of `embedcache.data.batch.Batch`.
    """

    items: list[tuple[StoredBlock, int]]
    total: Counts
    last_part: bool


def split_batch(items: list[tuple[StoredBlock, int]], max_tokens: int) -> Iterator[BatchPart]:
    """Split a batch into parts of whole sequences; see `group_by_tokens`."""
    spans = [block.rows_S2[index].tolist() for block, index in items]
    targets = sum(
        int(np.count_nonzero(block.loss_mask_N[first + 1 : stop]))
        for (block, _), (first, stop) in zip(items, spans, strict=True)
    )
    lengths = [stop - first for first, stop in spans]
    total, parts = Counts(sum(lengths), targets), group_by_tokens(lengths, max_tokens)
    for part in parts:
        yield BatchPart([items[index] for index in part], total, part is parts[-1])


def group_by_tokens(lengths: list[int], max_tokens: int, *, look_ahead: int = 0) -> list[list[int]]:
    """Group sequences into groups of at most ``max_tokens`` tokens; return indices.

    Groups are filled in order. A group skips up to ``look_ahead`` sequences that do not fit, in
    favour of later ones that do. A sequence longer than ``max_tokens`` is a group of its own. There
    is at least one group, which is empty if there are no sequences.

    >>> group_by_tokens([5, 3, 2, 4], 8), group_by_tokens([3, 9, 2, 1], 5)
    ([[0, 1], [2, 3]], [[0], [1], [2, 3]])
    >>> group_by_tokens([3, 9, 2, 1], 5, look_ahead=1)
    [[0, 2], [1], [3]]
    """
    waiting, groups = deque(range(len(lengths))), list[list[int]]()
    while waiting or not groups:
        room, group, skipped = max_tokens, list[int](), list[int]()
        while waiting and room > 0 and len(skipped) <= look_ahead:
            index = waiting.popleft()
            if lengths[index] <= room or not (group or skipped):
                group.append(index)
                room -= lengths[index]
            else:
                skipped.append(index)
        waiting.extendleft(reversed(skipped))
        groups.append(group)
    return groups


def pack_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Pack sequences into rows of at most ``width`` tokens; return the indices of each row.

    First fit, longest first.

    >>> pack_rows([5, 3, 2, 4], 5)
    [[0], [3], [1, 2]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, space in enumerate(free) if space >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(width)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the host, its embeddings still encoded, with undefined values on padding.

    ``rows_3BT`` holds ids_BT, positions_BT and segments_BT, ``predict_2N`` predict_N and targets_N:
    each pair or triple is copied to the device as one tensor. All else is as in
    `embedcache.data.batch.Batch`.
    """

    arrays: dict[str, dict[str, torch.Tensor]]
    rows_3BT: torch.Tensor
    predict_2N: torch.Tensor
    top_ids_NJ: torch.Tensor | None
    documents_N: Array
    source_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool
    cu_seqlens_M: torch.Tensor | None
    total: Counts
    last_part: bool


def pack(
    part: BatchPart,
    taps: tuple[str, ...],
    specs: tuple[ArraySpec, ...],
    device: torch.device,
    *,
    row_tokens: int | None = None,
) -> Packed:
    """Pack sequences into rows, in pinned memory if ``device`` is CUDA.

    Args:
        part: the sequences.
        taps: taps whose embeddings are packed.
        specs: the arrays that store a tap.
        device: where the batch will be copied.
        row_tokens: pack all sequences into one row of this length, or of their total length if
            that is larger. By default the rows are as long as the longest sequence needs.
    """
    items = part.items
    spans = [block.rows_S2[index].tolist() for block, index in items]
    lengths = [stop - first for first, stop in spans]
    new = partial(torch.empty, pin_memory=device.type == "cuda")
    cu_seqlens_M = None
    if row_tokens is None:
        T = round_up(max(lengths), ROW_MULTIPLE)
        rows = pack_rows(lengths, T)
    else:
        T = max(row_tokens, sum(lengths))
        rows, cu_seqlens_M = [list(range(len(items)))], _cu_seqlens(lengths, T, new)
    B = len(rows)
    arrays = {
        tap: {
            spec.group: new(
                (B, T, *items[0][0].arrays[tap][spec.group].shape[1:]),
                dtype=getattr(torch, spec.dtype),
            )
            for spec in specs
        }
        for tap in taps
    }
    views = [
        (tap, group, a.flatten(0, 1).numpy()) for tap in taps for group, a in arrays[tap].items()
    ]
    starts, ids, masks, top_ids = [], [], [], []
    for b, row in enumerate(rows):
        start = b * T
        for index in row:
            (block, _), (first, stop) = items[index], spans[index]
            for tap, group, view in views:
                view[start : start + stop - first] = block.arrays[tap][group][first:stop]
            ids.append(block.ids_N[first:stop])
            masks.append(block.loss_mask_N[first:stop])
            if block.top_ids_NJ is not None:
                top_ids.append(block.top_ids_NJ[first:stop])
            starts.append(start)
            start += stop - first
    order_S = np.concatenate(rows)
    length_S = np.array(lengths)[order_S]
    # One value for each token, without padding.
    segments, all_ids = np.repeat(order_S, length_S), np.concatenate(ids)
    positions = np.arange(len(all_ids)) - np.repeat(np.cumsum(length_S) - length_S, length_S)
    flat = np.repeat(starts, length_S) + positions
    rows_3BT = new((3, B, T), dtype=torch.int64)
    for row_values, values, padding in zip(
        rows_3BT.flatten(1).numpy(), (all_ids, positions, segments), (0, 0, -1), strict=True
    ):
        row_values.fill(padding)
        row_values[flat] = values
    target_N = np.flatnonzero(np.concatenate(masks) & (positions > 0))
    predict_2N = new((2, len(target_N)), dtype=torch.int64)
    predict_2N.numpy()[:] = flat[target_N] - 1, all_ids[target_N]
    top_ids_NJ = None
    if top_ids:
        top_ids_NJ = new((len(target_N), top_ids[0].shape[1]), dtype=torch.int32)
        top_ids_NJ.numpy()[:] = np.concatenate(top_ids)[target_N - 1]
    segment_N = segments[target_N]
    document_S = np.array([block.document_S[index] for block, index in items])
    sequence_S = np.array([block.sequence_S[index] for block, index in items])
    return Packed(
        arrays=arrays,
        rows_3BT=rows_3BT,
        predict_2N=predict_2N,
        top_ids_NJ=top_ids_NJ,
        documents_N=document_S[segment_N],
        source_N2=np.stack([sequence_S[segment_N], positions[target_N] - 1], axis=1),
        sequences=tuple(sequence_S.tolist()),
        tokens=len(all_ids),
        packed=any(len(row) > 1 for row in rows),
        cu_seqlens_M=cu_seqlens_M,
        total=part.total,
        last_part=part.last_part,
    )


def _cu_seqlens(lengths: list[int], T: int, new: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return cu_seqlens_M of one row of T tokens; see `embedcache.data.batch.Batch`.

    Padding is cut into pieces: attention over variable lengths takes the time that sequences as
    long as the longest one would.
    """
    used, longest = sum(lengths), max(lengths)
    starts = [*np.cumsum([0, *lengths]).tolist(), *range(used + longest, T, longest)]
    power_of_two = 1 << len(starts).bit_length()
    size = round_up(len(starts) + 1, min(power_of_two, CU_SEQLENS_MULTIPLE))
    cu_seqlens_M = new(size, dtype=torch.int32).fill_(T)
    cu_seqlens_M.numpy()[: len(starts)] = starts
    return cu_seqlens_M
