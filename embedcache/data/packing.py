"""Sequences packed into the rows of a batch, on the host.

Axes: B rows, T time, H hidden, N wanted positions, M starts of sequences, S sequences, L tokens
that are no padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from embedcache.cache.codecs.integers import ArraySpec
from embedcache.cache.split_reader import StoredBlock
from embedcache.data.batch import Counts
from embedcache.units import rounded_up

Array = np.ndarray[Any, Any]

COLUMNS = 64
"""Of how many positions rows have a multiple, so that few shapes are about: products of each new
one are planned anew."""
STARTS = 64
"""Of how many sequence starts a batch of one row has a multiple, so that few shapes are about; or,
of less, a power of two: attention's gradient takes memory of 128 positions for each of them."""


class Cut(NamedTuple):
    """Sequences of a batch, or of a part of one: (block, place in the block); see `Batch`."""

    items: list[tuple[StoredBlock, int]]
    whole: Counts
    last: bool


def cut_batch(items: list[tuple[StoredBlock, int]], most: int) -> Iterator[Cut]:
    """Cut a batch into parts of at most ``most`` tokens, of whole sequences; a longer one alone."""
    rows = [block.rows_S2[place].tolist() for block, place in items]
    targets = sum(
        int(np.count_nonzero(block.loss_mask_N[first + 1 : stop]))
        for (block, _), (first, stop) in zip(items, rows, strict=True)
    )
    lengths = [stop - first for first, stop in rows]
    whole, parts = Counts(sum(lengths), targets), cut_parts(lengths, most)
    for part in parts:
        yield Cut([items[index] for index in part], whole, part is parts[-1])


def cut_parts(lengths: list[int], most: int, *, ahead: int = 0) -> list[list[int]]:
    """Cut sequences into runs of at most ``most`` tokens; a longer one is alone.

    In order; but a run passes over up to ``ahead`` sequences that do not fit, for such behind them
    that do. Of no sequences, there is one run without any.

    >>> cut_parts([5, 3, 2, 4], 8), cut_parts([3, 9, 2, 1], 5), cut_parts([3, 9, 2, 1], 5, ahead=1)
    ([[0, 1], [2, 3]], [[0], [1], [2, 3]], [[0, 2], [1], [3]])
    """
    waiting, parts = deque(range(len(lengths))), list[list[int]]()
    while waiting or not parts:
        room, taken, passed = most, list[int](), list[int]()
        while waiting and room > 0 and len(passed) <= ahead:
            index = waiting.popleft()
            if lengths[index] <= room or not (taken or passed):
                taken.append(index)
                room -= lengths[index]
            else:
                passed.append(index)
        waiting.extendleft(reversed(passed))
        parts.append(taken)
    return parts


def pack_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Pack sequences into rows of at most ``width`` tokens (first fit, longest first).

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
    """A batch on the host, its embeddings still integers, undefined on padding; see `Batch`.

    What is copied to the device together is one tensor: ``rows_3BT`` are ids_BT, positions_BT and
    segments_BT, ``predict_2N`` predict_N and targets_N. ``top_ids_NK`` are those of wanted positions.
    """

    arrays: dict[str, dict[str, torch.Tensor]]
    rows_3BT: torch.Tensor
    predict_2N: torch.Tensor
    top_ids_NK: torch.Tensor | None
    documents_N: Array
    places_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool
    cu_seqlens_M: torch.Tensor | None
    whole: Counts
    last: bool


def pack(
    cut: Cut,
    taps: tuple[str, ...],
    specs: tuple[ArraySpec, ...],
    device: torch.device,
    *,
    row_tokens: int | None = None,
) -> Packed:
    """Pack sequences into rows; what goes to the device into pinned memory for CUDA.

    With ``row_tokens`` into one row of that length, or of theirs if they are longer.
    """
    items = cut.items
    spans = [block.rows_S2[place].tolist() for block, place in items]
    lengths = [stop - first for first, stop in spans]
    made = partial(torch.empty, pin_memory=device.type == "cuda")
    cu_seqlens_M = None
    if row_tokens is None:
        T = rounded_up(max(lengths), COLUMNS)
        rows = pack_rows(lengths, T)
    else:
        rows, T = [list(range(len(items)))], max(row_tokens, sum(lengths))
        # The padding in pieces: attention over spans takes time for what the longest might hold.
        padding = range(sum(lengths) + max(lengths), T, max(lengths))
        begin = [*np.cumsum([0, *lengths]).tolist(), *padding]
        few = 1 << len(begin).bit_length()
        size = rounded_up(len(begin) + 1, min(few, STARTS))
        cu_seqlens_M = made(size, dtype=torch.int32).fill_(T)
        cu_seqlens_M.numpy()[: len(begin)] = begin
    B = len(rows)
    arrays = {
        tap: {
            spec.group: made(
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
    at, ids, masks, tops = [], [], [], []
    for b, row in enumerate(rows):
        start = b * T
        for index in row:
            (block, _), (first, stop) = items[index], spans[index]
            for tap, group, view in views:
                view[start : start + stop - first] = block.arrays[tap][group][first:stop]
            ids.append(block.ids_N[first:stop])
            masks.append(block.loss_mask_N[first:stop])
            if block.top_ids_NJ is not None:
                tops.append(block.top_ids_NJ[first:stop])
            at.append(start)
            start += stop - first
    order_S = np.concatenate(rows)
    length_S = np.array(lengths)[order_S]
    segment_L, ids_L = np.repeat(order_S, length_S), np.concatenate(ids)
    position_L = np.arange(len(ids_L)) - np.repeat(np.cumsum(length_S) - length_S, length_S)
    flat_L = np.repeat(at, length_S) + position_L
    rows_3BT = made((3, B, T), dtype=torch.int64)
    for values, values_L, unused in zip(
        rows_3BT.flatten(1).numpy(), (ids_L, position_L, segment_L), (0, 0, -1), strict=True
    ):
        values.fill(unused)
        values[flat_L] = values_L
    target_N = np.flatnonzero(np.concatenate(masks) & (position_L > 0))
    predict_2N = made((2, len(target_N)), dtype=torch.int64)
    predict_2N.numpy()[:] = flat_L[target_N] - 1, ids_L[target_N]
    top_ids_NK = None
    if tops:
        top_ids_NK = made((len(target_N), tops[0].shape[1]), dtype=torch.int32)
        top_ids_NK.numpy()[:] = np.concatenate(tops)[target_N - 1]
    segment_N, place_N = segment_L[target_N], position_L[target_N] - 1
    document_S = np.array([block.document_S[place] for block, place in items])
    sequence_S = np.array([block.sequence_S[place] for block, place in items])
    return Packed(
        arrays,
        rows_3BT,
        predict_2N,
        top_ids_NK,
        document_S[segment_N],
        np.stack([sequence_S[segment_N], place_N], axis=1),
        tuple(sequence_S.tolist()),
        len(ids_L),
        any(len(row) > 1 for row in rows),
        cu_seqlens_M,
        cut.whole,
        cut.last,
    )
