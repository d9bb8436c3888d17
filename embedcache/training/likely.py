"""The base's likeliest tokens of every train position, found once, for shortlists."""

from __future__ import annotations

import torch

from embedcache.base.head import Head
from embedcache.cache.loader import Batch, BatchLoader
from embedcache.loss import likeliest
from embedcache.progress import Progress


class LikelyTokens:
    """Holds the K likeliest tokens by (sequence, position): 4·K bytes a token of host memory."""

    def __init__(self, loader: BatchLoader, head: Head, count: int, tokens: int, bar: Progress):
        self._first: dict[int, int] = {}
        self._rows_NK = torch.empty(tokens, count, dtype=torch.int32)
        device = head.weight_VH.device
        filled = 0
        with bar.bar("finding the base's likely tokens", tokens, "tok") as progress:
            for batch in loader.epoch(0):
                real = batch.segments_BT >= 0
                lengths = torch.bincount(batch.segments_BT[real]).tolist()
                for sequence, length in zip(batch.sequences, lengths, strict=True):
                    self._first[sequence] = filled
                    filled += length
                x_NH = batch.x_BTH["final"][real].to(device, head.weight_VH.dtype)
                self._rows_NK[self._rows(batch)[real]] = likeliest(x_NH, head, count).int().cpu()
                progress.advance(batch.tokens)

    def _rows(self, batch: Batch) -> torch.Tensor:
        """Return the row of each position of a batch, [B, T]; meaningless on padding."""
        first_S = torch.tensor([self._first[sequence] for sequence in batch.sequences])
        return first_S[batch.segments_BT] + batch.positions_BT

    def of(self, batch: Batch) -> torch.Tensor:
        """Return the likely tokens of a batch's wanted positions, int64 [N, K]."""
        return self._rows_NK[self._rows(batch).flatten()[batch.wanted_N]].long()
