"""Batches padded to one of a few shapes, in tensors that a CUDA graph reads.

Axes: N predicted positions, C columns of a shortlist, M boundaries of sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.loss import Shortlist
from embedcache.training.step.stack import POSITIONS_MULTIPLE
from embedcache.training.step.step_inputs import StepInputs
from embedcache.units import round_up

PIECES, COLUMNS = 4, 1024
"""Predicted positions are padded to a multiple of 1/4 of a row, and the columns of a shortlist to a
multiple of 1,024, so that shapes recur."""

BOUNDARIES = 16
"""Least number of boundaries that a part within a memory budget is padded to. A part with more
boundaries needs a new graph."""

Buffers = dict[tuple[object, ...], Tensor]
"""The tensors that batches are copied to, by name and shape. Graphs share equal ones."""


class Shape(NamedTuple):
    """The sizes that a batch is padded to.

    Attributes:
        row: tokens of the row, padding included.
        boundaries: boundaries of sequences.
        positions: predicted positions.
        columns: columns of the shortlist; 0 without one.
    """

    row: int
    boundaries: int
    positions: int
    columns: int

    def holds(self, other: Shape) -> bool:
        """Say whether batches of another shape can be padded to this one."""
        alike = self.row == other.row and bool(self.columns) == bool(other.columns)
        return alike and self.around(other) == self

    def logits(self) -> int:
        """Return the number of logits, positions times columns, by which graphs are compared."""
        return self.positions * max(1, self.columns)

    def around(self, other: Shape) -> Shape:
        """Return the smallest shape to which batches of both can be padded."""
        return Shape(*map(max, zip(self, other, strict=True)))


def shape_of(inputs: StepInputs, *, whole: bool) -> Shape:
    """Return the shape to which a batch of one row is padded.

    With ``whole``, the shape has every position of the row, and more boundaries than most parts.
    """
    batch = inputs.batch
    assert batch.cu_seqlens_M is not None
    row = batch.ids_BT.shape[1]
    piece = round_up(row if whole else -(-row // PIECES), POSITIONS_MULTIPLE)
    columns = [len(one.weight_CH) for one in inputs.shortlists]
    return Shape(
        row=row,
        boundaries=max(len(batch.cu_seqlens_M), BOUNDARIES if whole else 0),
        positions=round_up(max(1, len(batch.targets_N)), piece),
        columns=round_up(sum(columns), COLUMNS),
    )


def padded(inputs: StepInputs, shape: Shape, buffers: Buffers) -> StepInputs:
    """Copy a batch of one row to ``buffers``, padded to a shape; missing buffers are added.

    The loss of positions that pad the batch has weight 0, and columns that pad a shortlist have
    probability 0.
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
        cu_seqlens_M=shared("cu_seqlens_M", batch.cu_seqlens_M, shape.boundaries),
        predict_N=shared("predict_N", batch.predict_N, N),
        targets_N=shared("targets_N", batch.targets_N, N),
        top_ids_NJ=None,
    )
    weight_N = shared("weight_N", batch.targets_N, N, dtype=torch.float32)
    made = StepInputs(filled, shortlists, weight_N)
    _copy(inputs, made)
    return made


def _copy(given: StepInputs, filled: StepInputs) -> None:
    """Copy a batch into a larger one, and write the padding.

    Few calls are made, because each releases the interpreter's lock to the loader's threads.
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
