"""A batch: sequences packed into rows, with the targets of the loss.

Axes: B rows, T time, H hidden, N predicted positions, M boundaries of sequences, J top ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, Any]


class Counts(NamedTuple):
    """Numbers of tokens, without padding, and of targets among them."""

    tokens: int
    targets: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, or one part of a batch that is computed in several parts.

    A row holds one or more whole sequences, then padding. Tensors are on the loader's device,
    arrays on the host.

    Attributes:
        x_BTH: embeddings by tap, bfloat16; zero on padding.
        ids_BT: token ids.
        positions_BT: positions, from 0 in each sequence.
        segments_BT: the number of the token's sequence in this batch, -1 on padding. Attention
            never crosses segments.
        predict_N: flat indices, in [0, B·T), of the positions whose next token is a target.
        targets_N: these next tokens.
        documents_N: the document of each predicted position.
        source_N2: the sequence of each predicted position, numbered as in the split, and the
            position in that sequence.
        sequences: the sequences of the batch, numbered as in the split.
        tokens: number of tokens, without padding.
        packed: whether any row holds more than one sequence. If none does, causal attention needs
            no mask.
        cu_seqlens_M: int32, for a batch of one row: where each sequence starts, where each piece of
            padding starts (none is longer than the longest sequence), and the row's length,
            repeated. None for a batch of several rows.
        total: the counts of the whole batch, all parts together.
        last_part: whether no part of the batch follows.
        top_ids_NJ: int32, the base's top ids at predicted positions, if the loader was asked for
            them; see `embedcache.cache.format.layout.LIKELY`.
    """

    x_BTH: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    predict_N: torch.Tensor
    targets_N: torch.Tensor
    documents_N: Array
    source_N2: Array
    sequences: tuple[int, ...]
    tokens: int
    packed: bool
    cu_seqlens_M: torch.Tensor | None
    total: Counts
    last_part: bool
    top_ids_NJ: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors on the loader's device."""
        tensors = (
            *(*self.x_BTH.values(), self.ids_BT, self.positions_BT, self.segments_BT),
            *(self.predict_N, self.targets_N, self.top_ids_NJ, self.cu_seqlens_M),
        )
        return [tensor for tensor in tensors if tensor is not None]

    def without_tokens(self) -> Batch:
        """Return a batch of padding alone, in the place of a part that this batch does not have."""
        empty_N = self.predict_N[:0].clone()
        return replace(
            self,
            x_BTH={tap: torch.zeros_like(x[:1, :1]) for tap, x in self.x_BTH.items()},
            ids_BT=self.ids_BT[:1, :1].clone(),  # a view would keep the whole tensor
            positions_BT=torch.zeros_like(self.positions_BT[:1, :1]),
            segments_BT=torch.full_like(self.segments_BT[:1, :1], -1),
            predict_N=empty_N,
            targets_N=empty_N,
            documents_N=self.documents_N[:0],
            source_N2=self.source_N2[:0],
            sequences=(),
            tokens=0,
            packed=False,
            cu_seqlens_M=None if self.cu_seqlens_M is None else self.cu_seqlens_M[:2].clamp_max(1),
            last_part=True,
            top_ids_NJ=None,
        )

    def at_predicted(self, value_BTH: torch.Tensor) -> torch.Tensor:
        """Return value_NH: a [B, T, H] tensor at the positions whose next token is a target."""
        return value_BTH.flatten(0, 1).index_select(0, self.predict_N)
