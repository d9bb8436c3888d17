"""The head's rows of the labels.

Axes: N positions, R positions of a chunk, C columns, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedcache.loss.tiles import Tile
from embedcache.loss.vocab_subset import VocabSubset


class LabelRows:
    """Each label's row of the head: looked up, or kept as its tile streams by.

    Labels outside the columns have some other's row; their loss is NaN.
    """

    def __init__(self, columns: VocabSubset, targets_N: Tensor, device: torch.device):
        self._columns = columns
        self._targets_N = targets_N.clamp(0, max(0, len(columns.weight_CH) - 1))
        self._kept_NH: Tensor | None = None
        self._streamed = columns.weight_CH.device != device

    def see(self, tile: Tile) -> None:
        """Keep the rows in a tile that is about to go."""
        if not self._streamed:
            return
        weight_CH = tile.columns.weight_CH
        if self._kept_NH is None:
            self._kept_NH = weight_CH.new_zeros(len(self._targets_N), weight_CH.shape[1])
        place_N = self._targets_N - tile.start
        here_N1 = ((place_N >= 0) & (place_N < len(weight_CH)))[:, None]
        found_NH = weight_CH[place_N.clamp(0, len(weight_CH) - 1)]
        torch.where(here_N1, found_NH, self._kept_NH, out=self._kept_NH)

    def source(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return a matrix, and the rows of it, [R], that are those of some positions' labels."""
        if self._kept_NH is not None:
            return self._kept_NH, torch.arange(chunk.start, chunk.stop, device=self._kept_NH.device)
        return self._columns.weight_CH, self._targets_N[chunk]

    def log_weight(self, chunk: slice) -> Tensor | float:
        """Return the log-weights of some positions' labels, [R], or 0."""
        if self._columns.log_weight_C is None:
            return 0.0
        return self._columns.log_weight_C[self._targets_N[chunk]]
