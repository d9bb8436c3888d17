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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from embedcache.device import recording, wait_for
from embedcache.training.step.padding import Buffers, Shape, filled_up, shape_of
from embedcache.training.step.settings import Recipe
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs

SHAPES = 12
"""Shapes that are recorded; parts of further ones are computed kernel by kernel."""
MOST = 8
"""Carry-ons of a stack of which parts are recorded: with more, the GPU is what a step waits for,
and a recording would only hold memory."""
OFTEN = 20
"""Times that a shape comes before it is recorded, where a larger one's recording takes it till
then: most shapes are of epochs' last batches, and to record one takes long."""
WARM_UPS = 2
"""Times that a part is computed before it is recorded."""

Made = TypeVar("Made")


def recordable(recipe: Recipe, carryons: int) -> bool:
    """Say whether a recipe's steps of so many carry-ons are recorded."""
    return recipe.capture and carryons <= MOST


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph, and the losses that come out of it. What goes in are the `Buffers`."""

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
        self._buffers: Buffers = {}
        self._seen: Counter[Shape] = Counter()
        self._pool: Any = None
        self._tight = stack.recipe.part_tokens is not None
        self._done: torch.cuda.Event | None = None
        self.room = True
        self._end: End | None = None
        if stack.ends_alone():
            with self._recording():
                self._end = self._record_end()

    def prepared(self, work: Sequence[Work]) -> Callable[[], Tensor]:
        """Return what does `Stack.differentiate`; its losses hold until the next time.

        A batch that is recorded, or will be, is copied now: nobody needs it after that.
        """
        inputs, filled = work[0].inputs, None
        if self.room and all(one.inputs is inputs for one in work) and self._fits(inputs):
            shape = self._shape(inputs)
            if shape in self._recorded or len(self._recorded) < SHAPES:
                with self._recording():
                    filled = filled_up(inputs, shape, self._buffers)
        if filled is None:
            return self._stack.prepared(work)
        return partial(self._take, shape, [replace(one, inputs=filled) for one in work])

    def _take(self, shape: Shape, work: Sequence[Work]) -> Tensor:
        """Replay the parts of a shape, recorded now if it is new and there is room."""
        if shape not in self._recorded:
            with self._recording():
                self._recorded[shape] = self._record(work)
        if shape not in self._recorded:
            return self._stack.differentiate(work)
        recorded = self._recorded[shape]
        recorded.graph.replay()
        if not work[0].inputs.batch.last_part:
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

    def _fits(self, inputs: StepInputs) -> bool:
        one_row = inputs.batch.cu_seqlens_M is not None and len(inputs.shortlists) <= 1
        return one_row and not self._stack.streams(inputs)

    def _shape(self, inputs: StepInputs) -> Shape:
        """Return the shape to take a batch in."""
        shape = shape_of(inputs, whole=self._tight)
        if self._tight:  # a second recording would want a part's memory again: one for all
            for other in self._recorded:
                if other.takes(shape):
                    return other
                if other.row == shape.row:
                    shape = other.around(shape)
            if self._recorded:
                self._drop()
            return shape
        self._seen[shape] += 1
        larger = [other for other in self._recorded if other.takes(shape)]
        if self._seen[shape] < OFTEN or len(self._recorded) == SHAPES:
            return min(larger, key=Shape.size, default=shape)
        return shape

    def _drop(self) -> None:
        """Let all recordings go, once the device is done with them."""
        wait_for(self._device)
        self._recorded.clear()
        self._buffers.clear()
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

    def _record(self, work: Sequence[Work]) -> Recorded:
        """Record a part that was filled up; nothing is added to a gradient by it."""
        with self._stack.counting_nothing():
            graph, loss_K = record(
                lambda: self._stack.differentiate(work),
                self._device,
                self._pool,
                whole=self._tight,
            )
        self._pool = graph.pool()
        return Recorded(loss_K, graph)

    def _record_end(self) -> End:
        """Record the end of a step, before any gradient is there; no carry-on moves by it."""
        given_K = torch.zeros_like(self._stack.optimizer.gradient_KP[:, 0], dtype=torch.float32)
        with self._stack.optimizer.held():
            # In memory of its own: that of parts would stay for it when they are let go of.
            graph, (loss_K, norm_K) = record(
                lambda: self._stack.finish(given_K), self._device, None
            )
        return End(given_K, loss_K, norm_K, graph)


def record(
    part: Callable[[], Made], device: torch.device, pool: Any, *, whole: bool = False
) -> tuple[Any, Made]:
    """Return a CUDA graph of what ``part`` does, in the memory of ``pool``, and its result.

    It is done a few times before: kernels are compiled then, libraries take their memory, and how
    much the part wants is seen. ``whole``: the recording takes that much first, in one piece. Piece
    by piece it would take half as much again, since nothing is given back before it ends; but
    pieces are what several recordings of one pool can share.
    """
    here, aside = torch.cuda.current_stream(device), _aside(device)
    if whole:
        torch.cuda.empty_cache()  # what one before it left would count
    aside.wait_stream(here)
    try:
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                part()
    finally:  # also where memory ran out: what was begun is still at the gradients
        here.wait_stream(aside)
    wanted = _idle_bytes(aside) if whole else 0
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Of a part whose memory ran out before its first kernel, the error is enough.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with (
            recording,
            torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
        ):
            torch.empty(wanted, dtype=torch.uint8, device=device)
            made = part()
    return graph, made


def _idle_bytes(stream: torch.cuda.Stream) -> int:
    """Return what torch's own allocator keeps for tensors of a stream, of which none is there."""
    if torch.cuda.get_allocator_backend() != "native":
        return 0
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["stream"] == stream.cuda_stream
        and segment["segment_type"] == "large"
        and segment["segment_pool_id"] == (0, 0)
    )


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
