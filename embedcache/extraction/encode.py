"""A block's embeddings as its codec's integers, on the device where they were computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from embedcache.base.head import Head
from embedcache.base.taps import FINAL
from embedcache.cache.codecs.integers import ArraySpec, Codec
from embedcache.cache.format.layout import TOP_IDS, ExtractSettings, block_arrays
from embedcache.extraction.buffers import Encoded
from embedcache.extraction.top_ids import top_ids_of

Array = np.ndarray[Any, Any]


class BlockEncoder:
    """Encodes the blocks of one split by its taps' codecs, and finds their top ids by a head."""

    def __init__(
        self,
        split: str,
        settings: ExtractSettings,
        codecs: dict[str, Codec],
        head: Head | None = None,
    ):
        """Have an encoder; without a ``head`` it finds no top ids, even if they are asked for."""
        self._codecs = codecs
        self._head = head
        self._top_ids = settings.top_ids
        self.specs: dict[str, ArraySpec] = block_arrays(split, settings)
        """The arrays of a block by path under the split."""

    def __call__(
        self, x_NH: dict[str, torch.Tensor], ids_N: Array, rows: int
    ) -> tuple[Encoded, torch.Tensor]:
        """Return the integers, and for each row whether every value of every tap is finite.

        The integers past the ``rows`` in use are zeros, which every coder stores for nothing.
        Rows are checked where they were computed: on a GPU that is free, on the host it would take
        threads that the coders need. A row that is not finite is encoded as zeros.
        """
        finite_N = finite_rows(x_NH)
        arrays = {}
        for tap, codec in self._codecs.items():
            clean_NH = torch.where(finite_N[:, None], x_NH[tap], 0)
            for group, values in codec.encode(clean_NH, ids_N).items():
                values[rows:] = 0
                arrays[f"{group}/{tap}"] = values
        if self._top_ids and self._head is not None:
            found_NK = top_ids_of(x_NH[FINAL][:rows], self._head, self._top_ids)
            arrays[TOP_IDS] = F.pad(found_NK, (0, 0, 0, len(finite_N) - rows))
        return arrays, finite_N


def finite_rows(x_NH: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return, for each row, whether every value of every tap is finite, on their device."""
    # A sum is finite only if every term is; in float32 the sum of finite embeddings is, too.
    return torch.stack([x.float().sum(dim=1).isfinite() for x in x_NH.values()]).all(dim=0)
