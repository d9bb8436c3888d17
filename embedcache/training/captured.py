"""A step recorded once for each shape of batch as a CUDA graph, and replayed.

A small carry-on's step is some three hundred kernels of a few microseconds each: launched one by
one, the GPU waits for Python. Replayed, all of them are one launch. What differs from step to step
is copied into the tensors that were recorded: a batch, rates, and how much a target counts.

Axes: K carry-ons, N wanted positions, C columns of a shortlist, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from embedcache.cache.batch import Batch
from embedcache.loss import Listed
from embedcache.training.stack import Stack, Work
from embedcache.units import rounded_up

POSITIONS, COLUMNS = 4096, 1024
"""Wanted positions and columns of a shortlist are filled up to a multiple, so that shapes recur."""
SHAPES = 12
"""Shapes that are recorded; batches of further ones are computed step by step."""
MOST = 8
"""Carry-ons of a stack of which steps are recorded: with more, the GPU is what a step waits for,
and a recording would only hold memory."""
WARM_UPS = 2
"""Steps before one is recorded."""

Shape = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The tensors of one shape: what goes in, losses and norms that come out, and their graph."""

    batch: Batch
    loss_K: Tensor
    norm_K: Tensor
    graph: Any


class Captured:
    """Takes whole steps of a stack whose carry-ons all see one batch of one row."""

    def __init__(self, stack: Stack, device: torch.device):
        self._stack, self._device = stack, device
        self._recorded: dict[Shape, Recorded] = {}
        self._pool: Any = None
        self._room = True

    def take(self, work: Sequence[Work]) -> tuple[Tensor, Tensor] | None:
        """Take the step that was scheduled; return losses and norms, each [K].

        They hold until the next step. None, and nothing done, where the batch is not of a kind, or
        one of too many shapes, to be recorded, or memory is short.
        """
        batch = work[0].batch
        if not self._room or any(one.batch is not batch for one in work) or not self._fits(batch):
            return None
        shape = shape_of(batch)
        if shape not in self._recorded:
            if len(self._recorded) == SHAPES:
                return None
            try:
                self._recorded[shape] = self._record(work, filled_up(batch))
            except torch.OutOfMemoryError:
                self._room = False
            if not self._room:  # recordings hold the memory of a step each: go on without
                self._recorded.clear()
                self._pool = None
                return None
        recorded = self._recorded[shape]
        refill(recorded.batch, batch)
        recorded.graph.replay()
        return recorded.loss_K, recorded.norm_K

    def _fits(self, batch: Batch) -> bool:
        return bool(
            batch.starts_M is not None
            and batch.last
            and batch.tokens == batch.whole.tokens
            and len(batch.targets_N)
            and len(batch.drawn) <= 1
        )

    def _record(self, work: Sequence[Work], batch: Batch) -> Recorded:
        """Record a step on a batch; no carry-on moves by it."""
        work = [replace(one, batch=batch) for one in work]

        def step() -> tuple[Tensor, Tensor]:
            return self._stack.finish(self._stack.differentiate(work))

        with self._stack.optimizer.held():
            graph, (loss_K, norm_K) = record(step, self._device, self._pool)
        self._pool = graph.pool()
        return Recorded(batch, loss_K, norm_K, graph)


def record(
    step: Callable[[], tuple[Tensor, Tensor]], device: torch.device, pool: Any
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Return a CUDA graph of what ``step`` does, in the memory of ``pool``, and its results.

    It is done a few times before: kernels are compiled then, and libraries take their memory.
    """
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # The loader's thread goes on taking memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        made = step()
    return graph, made


def shape_of(batch: Batch) -> Shape:
    """Return what batches must have in common to be computed by one recording."""
    assert batch.starts_M is not None
    return (
        tuple(batch.ids_BT.shape),
        len(batch.starts_M),
        rounded_up(len(batch.targets_N), POSITIONS),
        *(rounded_up(len(one.weight_CH), COLUMNS) for one in cast("Sequence[Listed]", batch.drawn)),
    )


def filled_up(batch: Batch) -> Batch:
    """Return a copy of a batch, its positions and columns filled up with such as count nothing."""
    assert batch.starts_M is not None
    N = rounded_up(len(batch.targets_N), POSITIONS)
    drawn = []
    for one in cast("Sequence[Listed]", batch.drawn):
        C = rounded_up(len(one.weight_CH), COLUMNS)
        drawn.append(
            Listed(
                one.weight_CH.new_zeros(C, one.weight_CH.shape[1]),
                None if one.bias_C is None else one.bias_C.new_zeros(C),
                one.log_weight_C.new_full((C,), -torch.inf),
                one.index_N.new_zeros(N),
            )
        )
    made = replace(
        batch,
        x_BTH={tap: torch.empty_like(x) for tap, x in batch.x_BTH.items()},
        ids_BT=torch.empty_like(batch.ids_BT),
        positions_BT=torch.empty_like(batch.positions_BT),
        segments_BT=torch.empty_like(batch.segments_BT),
        starts_M=torch.empty_like(batch.starts_M),
        wanted_N=batch.wanted_N.new_zeros(N),
        targets_N=batch.targets_N.new_zeros(N),
        counts_N=torch.zeros(N, device=batch.targets_N.device),
        drawn=drawn,
    )
    refill(made, batch)
    return made


def refill(made: Batch, batch: Batch) -> None:
    """Copy a batch into one of the same shape that was filled up."""
    assert made.starts_M is not None and batch.starts_M is not None and made.counts_N is not None
    for tap, x_BTH in made.x_BTH.items():
        x_BTH.copy_(batch.x_BTH[tap])
    for name in ("ids_BT", "positions_BT", "segments_BT", "starts_M"):
        getattr(made, name).copy_(getattr(batch, name))
    N = len(batch.targets_N)
    made.wanted_N[:N], made.targets_N[:N] = batch.wanted_N, batch.targets_N
    made.wanted_N[N:], made.targets_N[N:] = 0, 0
    made.counts_N[:N], made.counts_N[N:] = 1.0, 0.0
    pairs = zip(
        cast("Sequence[Listed]", made.drawn), cast("Sequence[Listed]", batch.drawn), strict=True
    )
    for kept, one in pairs:
        C = len(one.weight_CH)
        kept.weight_CH[:C] = one.weight_CH
        kept.log_weight_C[:C], kept.log_weight_C[C:] = one.log_weight_C, -torch.inf
        kept.index_N[:N], kept.index_N[N:] = one.index_N, 0
        if kept.bias_C is not None and one.bias_C is not None:
            kept.bias_C[:C] = one.bias_C
