"""The base's likeliest tokens of every wanted train position, found once, for shortlists."""

from __future__ import annotations

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.cache.loader import Batch, BatchLoader
from embedcache.loss import likeliest
from embedcache.progress import Progress


class LikelyTokens:
    """Holds the K likeliest tokens of each wanted position: 4·K bytes of host memory each."""

    def __init__(self, loader: BatchLoader, head: Head, count: int, tokens: int, bar: Progress):
        self._first: dict[int, int] = {}
        rows = []
        filled = 0
        with bar.bar("finding the base's likely tokens", tokens, "tok") as progress:
            for batch in loader.epoch(0):
                # Rows lie as batches hold them: sequence after sequence, each in order.
                sequence_N = batch.places_N2[:, 0]
                starts = np.flatnonzero(np.diff(sequence_N, prepend=-1))
                for start in starts.tolist():
                    self._first[int(sequence_N[start])] = filled + start
                x_NH = batch.at_wanted(batch.x_BTH["final"]).to(head.weight_VH.dtype)
                rows.append(likeliest(x_NH, head, count).int().cpu())
                filled += len(sequence_N)
                progress.advance(batch.tokens)
        self._rows_NK = torch.cat(rows)

    def of(self, batch: Batch, count: int) -> torch.Tensor:
        """Return the ``count`` likeliest of a batch's wanted positions, int64 [N, K], on the host.

        ``count`` is at most the one that they were found for.
        """
        sequence_N = batch.places_N2[:, 0]
        starts = np.flatnonzero(np.diff(sequence_N, prepend=-1))
        counts = np.diff(starts, append=len(sequence_N))
        first = np.array([self._first[int(sequence_N[start])] for start in starts])
        rows_N = np.repeat(first - starts, counts) + np.arange(len(sequence_N))
        return self._rows_NK[torch.from_numpy(rows_N), :count].long()
