"""Sequences packed into the rows of a batch, on the host.

Axes: B rows, T time, H hidden, N wanted positions, M starts of sequences, S sequences of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedcache.cache.batch import Counts
from embedcache.cache.codecs import ArraySpec
from embedcache.cache.reader import StoredBlock
from embedcache.units import rounded_up

Array = np.ndarray[Any, Any]

COLUMNS = 64
"""Of how many positions rows have a multiple, so that few shapes are about: products of each new
one are planned anew."""
STARTS = 64
"""Of how many sequence starts a batch of one row has a multiple, so that few shapes are about."""


def length(block: StoredBlock, place: int) -> int:
    """Return the tokens of a sequence of a block."""
    first, stop = block.rows_S2[place].tolist()
    return int(stop - first)


def counted(places: list[tuple[StoredBlock, int]]) -> Counts:
    """Return the tokens and targets of (block, place in the block) items."""
    targets = 0
    for block, place in places:
        first, stop = block.rows_S2[place].tolist()
        targets += int(np.count_nonzero(block.loss_mask_N[first + 1 : stop]))
    return Counts(sum(length(*place) for place in places), targets)


def cut_parts(lengths: list[int], most: int) -> list[list[int]]:
    """Cut sequences, in order, into runs of at most ``most`` tokens; a longer one is alone.

    >>> cut_parts([5, 3, 2, 4], 8)
    [[0, 1], [2, 3]]
    """
    parts: list[list[int]] = [[]]
    tokens = 0
    for index, size in enumerate(lengths):
        if parts[-1] and tokens + size > most:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += size
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
    """A batch on the host, its embeddings still integers, undefined on padding; see `Batch`."""

    arrays: dict[str, dict[str, torch.Tensor]]
    ids_BT: Array
    positions_BT: Array
    segments_BT: Array
    wanted_N: Array
    targets_N: Array
    documents_N: Array
    places_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool
    starts_M: Array | None


def pack(
    items: list[tuple[StoredBlock, int]],
    taps: tuple[str, ...],
    specs: tuple[ArraySpec, ...],
    device: torch.device,
    *,
    row_tokens: int | None = None,
) -> Packed:
    """Pack (block, place in the block) items; the integers into pinned memory for CUDA.

    With ``row_tokens`` into one row of that length, or of theirs if they are longer.
    """
    spans = [(int(a), int(b)) for a, b in (block.rows_S2[i] for block, i in items)]
    lengths = [stop - first for first, stop in spans]
    starts = None
    if row_tokens is None:
        T = rounded_up(max(lengths), COLUMNS)
        rows = pack_rows(lengths, T)
    else:
        rows, T = [list(range(len(items)))], max(row_tokens, sum(lengths))
        # The padding in pieces: attention over spans takes time for what the longest might hold.
        padding = range(sum(lengths) + max(lengths), T, max(lengths))
        begin = [*np.cumsum([0, *lengths]).tolist(), *padding]
        starts = np.full(rounded_up(len(begin) + 1, STARTS), T, np.int32)
        starts[: len(begin)] = begin
    B = len(rows)
    ids, positions = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    segments = np.full((B, T), -1, np.int64)
    arrays = {
        tap: {
            spec.group: torch.empty(
                (B, T, *items[0][0].arrays[tap][spec.group].shape[1:]),
                dtype=getattr(torch, spec.dtype),
                pin_memory=device.type == "cuda",
            )
            for spec in specs
        }
        for tap in taps
    }
    views = [(tap, group, a.numpy()) for tap in taps for group, a in arrays[tap].items()]
    wanted: list[Array] = []
    targets: list[Array] = []
    documents: list[Array] = []
    sources: list[Array] = []
    for b, row in enumerate(rows):
        start = 0
        for index in row:
            (block, i), (first, last) = items[index], spans[index]
            stop = start + lengths[index]
            ids[b, start:stop] = block.ids_N[first:last]
            positions[b, start:stop] = np.arange(lengths[index])
            segments[b, start:stop] = index
            for tap, group, view in views:
                view[b, start:stop] = block.arrays[tap][group][first:last]
            places = np.flatnonzero(block.loss_mask_N[first + 1 : last])
            wanted.append(b * T + start + places)
            targets.append(block.ids_N[first + 1 : last][places])
            documents.append(np.full(len(places), block.document_S[i]))
            sources.append(np.stack([np.full(len(places), block.sequence_S[i]), places], axis=1))
            start = stop
    return Packed(
        arrays,
        ids,
        positions,
        segments,
        np.concatenate(wanted),
        np.concatenate(targets),
        np.concatenate(documents),
        np.concatenate(sources),
        tuple(int(block.sequence_S[i]) for block, i in items),
        sum(lengths),
        any(len(row) > 1 for row in rows),
        starts,
    )
