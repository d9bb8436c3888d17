"""Walks a head tile by tile: views of one on the device, copies of one in host memory.

Axes: V columns in all, C columns of a tile, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedcache.loss.vocab_subset import VocabSubset


@dataclass(frozen=True, slots=True)
class Tile:
    """VocabSubset ``start`` to ``start + C`` of a softmax, on the device that computes it."""

    start: int
    columns: VocabSubset


def tiles(columns: VocabSubset, cuts: Sequence[slice], device: torch.device) -> Iterator[Tile]:
    """Yield the tiles of ``columns`` that ``cuts`` says; each is valid until the next."""
    bias = None if columns.bias_C is None else columns.bias_C.to(device)
    log_weight = None if columns.log_weight_C is None else columns.log_weight_C.to(device)
    weight_VH = columns.weight_CH
    weights: Iterator[Tensor] = (weight_VH[cut] for cut in cuts)
    if weight_VH.device != device:
        weights = _streamed(weight_VH, cuts, device)
    for cut, weight_CH in zip(cuts, weights, strict=True):
        tile = VocabSubset(
            weight_CH,
            None if bias is None else bias[cut],
            None if log_weight is None else log_weight[cut],
        )
        yield Tile(cut.start, tile)


def _streamed(weight_VH: Tensor, cuts: Sequence[slice], device: torch.device) -> Iterator[Tensor]:
    """Yield tiles copied to a CUDA device on a stream of their own, one ahead of the consumer."""
    consumer, copier = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    largest = max(cut.stop - cut.start for cut in cuts)
    buffers = weight_VH.new_empty(2, largest, weight_VH.shape[1], device=device)
    # The buffers' memory may still be read by earlier work, and freed before a copy has ended.
    copier.wait_stream(consumer)
    buffers.record_stream(copier)

    def copy(index: int) -> tuple[Tensor, torch.cuda.Event]:
        cut = cuts[index]
        with torch.cuda.stream(copier):
            tile_CH = buffers[index % 2, : cut.stop - cut.start]
            tile_CH.copy_(weight_VH[cut], non_blocking=True)
            return tile_CH, copier.record_event()

    coming = copy(0)
    for index in range(len(cuts)):
        tile_CH, copied = coming
        if index + 1 < len(cuts):
            # The other buffer is free once all work given to the consumer so far is done.
            copier.wait_stream(consumer)
            coming = copy(index + 1)
        consumer.wait_event(copied)
        yield tile_CH
