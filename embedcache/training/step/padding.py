"""Batches filled up to one of few shapes: with what counts nothing, in tensors that stay.

Axes: N wanted positions, C columns of a shortlist, M starts of sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.loss import Shortlist
from embedcache.training.step.stack import WANTED
from embedcache.training.step.step_inputs import StepInputs
from embedcache.units import rounded_up

PIECES, COLUMNS = 4, 1024
"""Wanted positions are filled up to so many parts of a row, and columns of a shortlist to a
multiple, so that shapes recur."""

STARTS = 16
"""Starts that a part has at least where memory is short: one of more would be recorded anew."""

Buffers = dict[tuple[object, ...], Tensor]
"""What batches are copied into, by name and shape: those of like shapes share it."""


class Shape(NamedTuple):
    """What batches must have in common to be computed by one recording.

    ``row``: tokens of the row, padding included. Of what follows, a recording takes less, too:
    ``starts`` of sequences, wanted ``positions``, and ``columns`` of a shortlist, 0 without one.
    """

    row: int
    starts: int
    positions: int
    columns: int

    def takes(self, other: Shape) -> bool:
        """Say whether a recording of this shape computes batches of another."""
        like = self.row == other.row and bool(self.columns) == bool(other.columns)
        return like and self.around(other) == self

    def size(self) -> int:
        """Return what its loss takes, by which recordings are compared."""
        return self.positions * max(1, self.columns)

    def around(self, other: Shape) -> Shape:
        """Return the shape that takes both, of one row."""
        return Shape(*map(max, zip(self, other, strict=True)))


def shape_of(inputs: StepInputs, *, whole: bool) -> Shape:
    """Return the shape that a batch is filled up to.

    Wanted positions to a quarter of the row, or more, or, where ``whole``, to all of it, and starts
    to more than most parts have.
    """
    batch = inputs.batch
    assert batch.cu_seqlens_M is not None
    row = batch.ids_BT.shape[1]
    piece = rounded_up(row if whole else -(-row // PIECES), WANTED)
    columns = [len(one.weight_CH) for one in inputs.shortlists]
    return Shape(
        row=row,
        starts=max(len(batch.cu_seqlens_M), STARTS if whole else 0),
        positions=rounded_up(max(1, len(batch.targets_N)), piece),
        columns=rounded_up(sum(columns), COLUMNS),
    )


def filled_up(inputs: StepInputs, shape: Shape, buffers: Buffers) -> StepInputs:
    """Return a copy of a batch of one row, filled up to a shape with what counts nothing.

    It is made of tensors of ``buffers``, which grow by those that are missing.
    """
    batch, N, C = inputs.batch, shape.positions, shape.columns

    def shared(name: str, like: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        key = (name, sizes, dtype or like.dtype)
        if key not in buffers:
            buffers[key] = like.new_zeros(sizes, dtype=dtype)
        return buffers[key]

    def same(name: str, like: Tensor) -> Tensor:
        return shared(name, like, *like.shape)

    assert batch.cu_seqlens_M is not None

    shortlists = [
        Shortlist(
            shared("weight_CH", one.weight_CH, C, one.weight_CH.shape[1]),
            None if one.bias_C is None else shared("bias_C", one.bias_C, C),
            shared("log_weight_C", one.log_weight_C, C),
            shared("index_N", one.index_N, N),
        )
        for one in inputs.shortlists
    ]
    filled = replace(
        batch,
        x_BTH={tap: same(f"x_BTH {tap}", x) for tap, x in batch.x_BTH.items()},
        ids_BT=same("ids_BT", batch.ids_BT),
        positions_BT=same("positions_BT", batch.positions_BT),
        segments_BT=same("segments_BT", batch.segments_BT),
        cu_seqlens_M=shared("cu_seqlens_M", batch.cu_seqlens_M, shape.starts),
        predict_N=shared("predict_N", batch.predict_N, N),
        targets_N=shared("targets_N", batch.targets_N, N),
        top_ids_NJ=None,
    )
    weight_N = shared("weight_N", batch.targets_N, N, dtype=torch.float32)
    made = StepInputs(filled, shortlists, weight_N)
    _copy(inputs, made)
    return made


def _copy(given: StepInputs, filled: StepInputs) -> None:
    """Copy a batch into one that is as large or larger, and fill that up.

    By few calls: each lets go of the interpreter's lock, which the loader's threads are after.
    """
    batch, made, weight_N = given.batch, filled.batch, filled.weight_N
    assert made.cu_seqlens_M is not None
    assert batch.cu_seqlens_M is not None
    assert weight_N is not None
    M, N = len(batch.cu_seqlens_M), len(batch.targets_N)
    pairs = [(x_BTH, batch.x_BTH[tap]) for tap, x_BTH in made.x_BTH.items()]
    pairs += [
        (made.ids_BT, batch.ids_BT),
        (made.positions_BT, batch.positions_BT),
        (made.segments_BT, batch.segments_BT),
        (made.cu_seqlens_M[:M], batch.cu_seqlens_M),
        (made.predict_N[:N], batch.predict_N),
        (made.targets_N[:N], batch.targets_N),
    ]
    zeros = [made.predict_N[N:], made.targets_N[N:], weight_N[N:]]
    for kept, one in zip(filled.shortlists, given.shortlists, strict=True):
        C = len(one.weight_CH)
        pairs += [
            (kept.weight_CH[:C], one.weight_CH),
            (kept.log_weight_C[:C], one.log_weight_C),
            (kept.index_N[:N], one.index_N),
        ]
        if kept.bias_C is not None and one.bias_C is not None:
            pairs.append((kept.bias_C[:C], one.bias_C))
        zeros.append(kept.index_N[N:])
        kept.log_weight_C[C:] = -torch.inf
    made.cu_seqlens_M[M:] = batch.ids_BT.shape[1]
    weight_N[:N] = 1.0
    torch._foreach_copy_([to for to, _ in pairs], [value for _, value in pairs])
    torch._foreach_zero_(zeros)
