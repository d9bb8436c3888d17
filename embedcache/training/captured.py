"""A part of a step recorded once for each shape as a CUDA graph, and replayed; its end, too.

A part is some three hundred kernels of a few microseconds each, where it or its carry-ons are
small: launched one by one, the GPU waits for Python. Replayed, all of them are one launch. What
differs from part to part is copied into the tensors that were recorded: a batch, and how much a
target counts.

Axes: K carry-ons, N wanted positions, C columns of a shortlist, V vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from embedcache.cache.batch import Batch
from embedcache.device import recording
from embedcache.loss import Listed
from embedcache.training.recipe import Recipe
from embedcache.training.stack import WANTED, Stack, Work
from embedcache.units import rounded_up

PIECES, COLUMNS = 4, 1024
"""Wanted positions are filled up to so many parts of a row, and columns of a shortlist to a
multiple, so that shapes recur."""
SHAPES = 12
"""Shapes that are recorded; parts of further ones are computed kernel by kernel."""
MOST = 8
"""Carry-ons of a stack of which parts are recorded: with more, the GPU is what a step waits for,
and a recording would only hold memory."""
WARM_UPS = 2
"""Times that a part is computed before it is recorded."""

Made = TypeVar("Made")
Inputs = dict[tuple[object, ...], Tensor]
"""What recordings read, by name and shape: those of like parts share it."""


def recordable(recipe: Recipe, carryons: int) -> bool:
    """Say whether a recipe's steps of so many carry-ons are recorded."""
    return recipe.capture and carryons <= MOST


class Shape(NamedTuple):
    """What batches must have in common to be computed by one recording.

    ``row``: tokens of the row, padding included. Of what follows, a recording takes less, too:
    ``starts`` of sequences, wanted ``positions``, and ``columns`` of a shortlist, 0 without one.
    """

    row: int
    starts: int
    positions: int
    columns: int

    def takes(self, other: Shape) -> bool:
        """Say whether a recording of this shape computes batches of another."""
        like = self.row == other.row and bool(self.columns) == bool(other.columns)
        return like and self.around(other) == self

    def around(self, other: Shape) -> Shape:
        """Return the shape that takes both, of one row."""
        return Shape(*map(max, zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Recorded:
    """The tensors of one shape: what goes in, the losses that come out, and their graph."""

    batch: Batch
    loss_K: Tensor
    graph: Any


@dataclass(frozen=True, slots=True)
class End:
    """The tensors of a step's end: its losses, those and the norms that come out, and its graph."""

    given_K: Tensor
    loss_K: Tensor
    norm_K: Tensor
    graph: Any


class Captured:
    """Takes the steps of a stack whose carry-ons all see one batch of one row by what was recorded.

    Parts of another kind, or of one too many shapes, are left to the stack; and so are all once
    there was no ``room`` for a recording.
    """

    def __init__(self, stack: Stack, device: torch.device):
        self._stack, self._device = stack, device
        self._recorded: dict[Shape, Recorded] = {}
        self._inputs: Inputs = {}
        self._pool: Any = None
        self._tight = stack.recipe.part_tokens is not None
        self._done: torch.cuda.Event | None = None
        self.room = True
        self._end: End | None = None
        if stack.ends_on_device():
            with self._recording():
                self._end = self._record_end()

    def differentiate(self, work: Sequence[Work]) -> Tensor:
        """Do what `Stack.differentiate` does; the losses hold until the next time."""
        batch = work[0].batch
        recorded = None
        if self.room and all(one.batch is batch for one in work) and self._fits(batch):
            recorded = self._of_shape(work)
        if recorded is None:
            return self._stack.differentiate(work)
        refill(recorded.batch, batch)
        recorded.graph.replay()
        if not batch.last:
            self._keep_up()
        return recorded.loss_K

    def finish(self, loss_K: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `Stack.finish` does; what it returns holds until the next time."""
        if self._end is None:
            return self._stack.finish(loss_K)
        self._end.given_K.copy_(loss_K)
        self._end.graph.replay()
        return self._end.loss_K, self._end.norm_K

    def _keep_up(self) -> None:
        """Wait for the part before this one: batches that are due later would fill the device."""
        if self._device.type == "cuda":
            before, self._done = self._done, torch.cuda.Event()
            self._done.record()
            if before is not None:
                before.synchronize()

    def _fits(self, batch: Batch) -> bool:
        one_row = batch.starts_M is not None and len(batch.drawn) <= 1
        return one_row and not self._stack.streams(batch)

    def _of_shape(self, work: Sequence[Work]) -> Recorded | None:
        """Return what was recorded for parts of this shape, now if it is new and there is room."""
        shape = shape_of(work[0].batch, whole=self._tight)
        if self._tight:  # a second recording would want a part's memory again: one for all
            for other, recorded in self._recorded.items():
                if other.takes(shape):
                    return recorded
                if other.row == shape.row:
                    shape = other.around(shape)
            if self._recorded:
                self._drop()
        if shape in self._recorded or len(self._recorded) == SHAPES:
            return self._recorded.get(shape)
        with self._recording():
            self._recorded[shape] = self._record(work, shape)
        return self._recorded.get(shape)

    def _drop(self) -> None:
        """Let all recordings go, once the device is done with them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._recorded.clear()
        self._inputs.clear()
        self._pool = None

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Go on without any recording if memory runs out: each holds that of a part."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.room = False
        if not self.room:
            gc.collect()  # what the error held
            self._drop()
            self._end = None

    def _record(self, work: Sequence[Work], shape: Shape) -> Recorded:
        """Record a part of this shape; nothing is added to a gradient by it."""
        batch = filled_up(work[0].batch, shape, self._inputs)
        work = [replace(one, batch=batch) for one in work]
        with self._stack.counting_nothing():
            graph, loss_K = record(
                lambda: self._stack.differentiate(work), self._device, self._pool
            )
        self._pool = graph.pool()
        return Recorded(batch, loss_K, graph)

    def _record_end(self) -> End:
        """Record the end of a step, before any gradient is there; no carry-on moves by it."""
        given_K = torch.zeros_like(self._stack.optimizer.gradient_KP[:, 0], dtype=torch.float32)
        with self._stack.optimizer.held():
            graph, (loss_K, norm_K) = record(
                lambda: self._stack.finish(given_K), self._device, self._pool
            )
        self._pool = graph.pool()
        return End(given_K, loss_K, norm_K, graph)


def record(part: Callable[[], Made], device: torch.device, pool: Any) -> tuple[Any, Made]:
    """Return a CUDA graph of what ``part`` does, in the memory of ``pool``, and its result.

    It is done a few times before: kernels are compiled then, and libraries take their memory.
    """
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    try:
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                part()
    finally:  # also where memory ran out: what was begun is still at the gradients
        here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Of a part whose memory ran out before its first kernel, the error is enough.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with (
            recording,
            torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
        ):
            made = part()
    return graph, made


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that a device's recordings are made on: libraries keep memory for each.

    They take it now, and not amid a part's memory, which would not be given back around it.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.enable_grad():
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
        (ones @ ones).sum().backward()
    return stream


def shape_of(batch: Batch, *, whole: bool) -> Shape:
    """Return the shape that a batch is filled up to.

    Wanted positions to a quarter of the row, or more, or, where ``whole``, to all of it.
    """
    assert batch.starts_M is not None
    row = batch.ids_BT.shape[1]
    piece = rounded_up(row if whole else -(-row // PIECES), WANTED)
    columns = [len(one.weight_CH) for one in cast("Sequence[Listed]", batch.drawn)]
    return Shape(
        row=row,
        starts=len(batch.starts_M),
        positions=rounded_up(max(1, len(batch.targets_N)), piece),
        columns=rounded_up(sum(columns), COLUMNS),
    )


def filled_up(batch: Batch, shape: Shape, inputs: Inputs) -> Batch:
    """Return a copy of a batch that is filled up to a shape with what counts nothing.

    It is made of tensors of ``inputs``, which grow by those that are missing.
    """
    assert batch.starts_M is not None
    N, C = shape.positions, shape.columns

    def shared(name: str, like: Tensor, *shape: int) -> Tensor:
        key = (name, shape, like.dtype)
        if key not in inputs:
            inputs[key] = like.new_zeros(shape)
        return inputs[key]

    drawn = []
    for one in cast("Sequence[Listed]", batch.drawn):
        drawn.append(
            Listed(
                shared("weight_CH", one.weight_CH, C, one.weight_CH.shape[1]),
                None if one.bias_C is None else shared("bias_C", one.bias_C, C),
                shared("log_weight_C", one.log_weight_C, C),
                shared("index_N", one.index_N, N),
            )
        )
    made = replace(
        batch,
        x_BTH={tap: shared(f"x_BTH {tap}", x, *x.shape) for tap, x in batch.x_BTH.items()},
        ids_BT=shared("ids_BT", batch.ids_BT, *batch.ids_BT.shape),
        positions_BT=shared("positions_BT", batch.positions_BT, *batch.positions_BT.shape),
        segments_BT=shared("segments_BT", batch.segments_BT, *batch.segments_BT.shape),
        starts_M=shared("starts_M", batch.starts_M, shape.starts),
        wanted_N=shared("wanted_N", batch.wanted_N, N),
        targets_N=shared("targets_N", batch.targets_N, N),
        counts_N=shared("counts_N", batch.x_BTH["final"].new_zeros(0).float(), N),
        drawn=drawn,
    )
    refill(made, batch)
    return made


def refill(made: Batch, batch: Batch) -> None:
    """Copy a batch into one of the same shape that was filled up."""
    assert made.starts_M is not None and batch.starts_M is not None and made.counts_N is not None
    for tap, x_BTH in made.x_BTH.items():
        x_BTH.copy_(batch.x_BTH[tap])
    for name in ("ids_BT", "positions_BT", "segments_BT"):
        getattr(made, name).copy_(getattr(batch, name))
    M, N = len(batch.starts_M), len(batch.targets_N)
    made.starts_M[:M], made.starts_M[M:] = batch.starts_M, batch.ids_BT.shape[1]
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
