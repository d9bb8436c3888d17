"""The columns of a softmax, and an iterator over them tile by tile.

Axes: N positions, n positions of a chunk, V vocabulary, C columns, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedcache.base.head import Head


@dataclass(frozen=True, slots=True)
class VocabSubset:
    """The tokens that a softmax runs over, and how their logits are computed.

    A logit is softcap · tanh(scale · (x·w + bias) / softcap) + log_weight.

    Attributes:
        weight_CH: their rows of the head.
        bias_C: their biases, or None.
        log_weight_C: added to their logits, or None.
        scale: factor of the logits.
        softcap: bound of the logits, by tanh, or None.
    """

    weight_CH: Tensor
    bias_C: Tensor | None = None
    log_weight_C: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def whole(cls, head: Head) -> VocabSubset:
        """Return the whole vocabulary of a head."""
        return cls(head.weight_VH, head.bias_V, None, head.logit_scale, head.softcap)

    def __len__(self) -> int:
        return len(self.weight_CH)


@dataclass(frozen=True, slots=True)
class Tile:
    """Columns ``start`` to ``start + C`` of a softmax, on the device that computes it."""

    start: int
    subset: VocabSubset


def tiles(subset: VocabSubset, slices: Sequence[slice], device: torch.device) -> Iterator[Tile]:
    """Yield the slices of ``subset`` as tiles on ``device``; each is valid until the next one.

    A tile of a subset on the device is a view, a tile of one in host memory a copy.
    """
    bias_C = None if subset.bias_C is None else subset.bias_C.to(device)
    log_weight_C = None if subset.log_weight_C is None else subset.log_weight_C.to(device)
    weights: Iterator[Tensor] = (subset.weight_CH[part] for part in slices)
    if subset.weight_CH.device != device:
        weights = _streamed(subset.weight_CH, slices, device)
    for part, weight_CH in zip(slices, weights, strict=True):
        tile = replace(
            subset,
            weight_CH=weight_CH,
            bias_C=None if bias_C is None else bias_C[part],
            log_weight_C=None if log_weight_C is None else log_weight_C[part],
        )
        yield Tile(part.start, tile)


def _streamed(weight_CH: Tensor, slices: Sequence[slice], device: torch.device) -> Iterator[Tensor]:
    """Yield tiles copied to a CUDA device on a stream of its own, one ahead of the consumer."""
    consumer, copier = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    largest = max(part.stop - part.start for part in slices)
    buffers = weight_CH.new_empty(2, largest, weight_CH.shape[1], device=device)
    # Earlier work may still read the buffers' memory; they may be freed before a copy has ended.
    copier.wait_stream(consumer)
    buffers.record_stream(copier)

    def copy(index: int) -> tuple[Tensor, torch.cuda.Event]:
        part = slices[index]
        with torch.cuda.stream(copier):
            tile_CH = buffers[index % 2, : part.stop - part.start]
            tile_CH.copy_(weight_CH[part], non_blocking=True)
            return tile_CH, copier.record_event()

    coming = copy(0)
    for index in range(len(slices)):
        tile_CH, copied = coming
        if index + 1 < len(slices):
            # The other buffer is free once all work given to the consumer so far is done.
            copier.wait_stream(consumer)
            coming = copy(index + 1)
        consumer.wait_event(copied)
        yield tile_CH


class LabelRows:
    """The head's row of each position's label: looked up, or copied from the tiles streamed by.

    A label outside the columns has the row of another token; its loss is NaN.
    """

    def __init__(self, subset: VocabSubset, targets_N: Tensor, device: torch.device):
        self._subset = subset
        self._targets_N = targets_N.clamp(0, max(0, len(subset) - 1))
        self._rows_NH: Tensor | None = None
        self._streamed = subset.weight_CH.device != device

    def copy_from(self, tile: Tile) -> None:
        """Copy the labels' rows out of a tile that is about to be overwritten."""
        if not self._streamed:
            return
        weight_CH = tile.subset.weight_CH
        if self._rows_NH is None:
            self._rows_NH = weight_CH.new_zeros(len(self._targets_N), weight_CH.shape[1])
        index_N = self._targets_N - tile.start
        inside_N1 = ((index_N >= 0) & (index_N < len(weight_CH)))[:, None]
        found_NH = weight_CH[index_N.clamp(0, len(weight_CH) - 1)]
        torch.where(inside_N1, found_NH, self._rows_NH, out=self._rows_NH)

    def source(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return a matrix [..., H] and index_n, the rows of it that belong to a chunk's labels."""
        if self._rows_NH is not None:
            return self._rows_NH, torch.arange(chunk.start, chunk.stop, device=self._rows_NH.device)
        return self._subset.weight_CH, self._targets_N[chunk]

    def log_weight(self, chunk: slice) -> Tensor | float:
        """Return the log-weights of a chunk's labels, [n], or 0."""
        if self._subset.log_weight_C is None:
            return 0.0
        return self._subset.log_weight_C[self._targets_N[chunk]]
