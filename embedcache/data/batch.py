"""What a trainer sees at a time.

Axes: B rows, T time, H hidden, N wanted positions, M starts of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Drawn = Sequence[Sequence[object]]


class Counts(NamedTuple):
    """Tokens, padding left out, and the targets among them."""

    tokens: int
    targets: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed into rows; a row holds one or more whole sequences, then padding.

    On the loader's device: ``x_BTH``, bfloat16 by tap, zero on padding; ``ids_BT``;
    ``positions_BT`` (from 0 in each sequence); ``segments_BT`` (-1 on padding; attention never
    crosses a segment); ``predict_N``, the flat positions, in [0, B*T), whose next token is a target;
    ``targets_N``, those tokens. On the host, of the same N: ``documents_N`` and ``places_N2``, the
    wanted position's sequence in the split and position in it. ``sequences``: numbers of the
    sequences in the split. ``tokens``: tokens, padding left out. ``packed``: whether any row holds
    more than one sequence; else plain causal attention crosses none. ``cu_seqlens_M``: of a batch that
    is one row, int32, where its sequences begin and pieces of its padding, none longer than the
    longest sequence, then its length, over and over; else None.

    A batch may be given in parts: ``whole`` counts the tokens and targets of all of them, and
    ``last`` says that none is to come. ``drawn``: what the loader was asked to make of it.
    ``counts_N``: float32, of one whose N was filled up to some number, 1 where a position counts.
    ``top_ids_NK``: int32, of wanted positions, where they were asked for; see
    `embedcache.cache.format.layout.LIKELY`.
    """

    x_BTH: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    predict_N: torch.Tensor
    targets_N: torch.Tensor
    documents_N: Array
    places_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool
    cu_seqlens_M: torch.Tensor | None
    whole: Counts
    last: bool
    drawn: Drawn = ()
    counts_N: torch.Tensor | None = None
    top_ids_NK: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return all that lies on the device."""
        names = (
            *("ids_BT", "positions_BT", "segments_BT"),
            *("predict_N", "targets_N", "top_ids_NK", "cu_seqlens_M"),
        )
        own = [*self.x_BTH.values(), *(getattr(self, name) for name in names)]
        return [
            tensor for tensor in (*own, *chain(*self.drawn)) if isinstance(tensor, torch.Tensor)
        ]

    def without_tokens(self) -> Batch:
        """Return a batch of padding alone, for one that has no more parts beside one that has."""
        nothing = self.predict_N[:0].clone()
        return replace(
            self,
            x_BTH={tap: torch.zeros_like(x[:1, :1]) for tap, x in self.x_BTH.items()},
            ids_BT=self.ids_BT[:1, :1].clone(),  # a view would keep all of it
            positions_BT=torch.zeros_like(self.positions_BT[:1, :1]),
            segments_BT=torch.full_like(self.segments_BT[:1, :1], -1),
            predict_N=nothing,
            targets_N=nothing,
            documents_N=self.documents_N[:0],
            places_N2=self.places_N2[:0],
            sequences=(),
            tokens=0,
            packed=False,
            cu_seqlens_M=None if self.cu_seqlens_M is None else self.cu_seqlens_M[:2].clamp_max(1),
            last=True,
            drawn=(),
            top_ids_NK=None,
        )

    def at_predicted(self, value_BTH: torch.Tensor) -> torch.Tensor:
        """Return the rows [N, H] of a [B, T, H] tensor whose next token is a target."""
        return value_BTH.flatten(0, 1).index_select(0, self.predict_N)
