"""Parts of a step, and its end, captured as CUDA graphs and replayed.

A part launches some three hundred kernels. Where the part or its carry-ons are small, a kernel
takes a few microseconds, and the GPU waits for Python to launch the next one. A graph is one
launch. What differs between parts is copied into the tensors that the graph reads: the batch, its
shortlist, and the weight of its targets.

Axes: K carry-ons.
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

from embedcache.device import capture_lock, synchronize
from embedcache.training.step.padding import Buffers, Shape, padded, shape_of
from embedcache.training.step.settings import StepSettings
from embedcache.training.step.stack import Stack, Work
from embedcache.training.step.step_inputs import StepInputs

SHAPES = 12
"""Most shapes that are captured. Parts of other shapes are computed kernel by kernel."""
MOST = 8
"""Most carry-ons of a stack whose parts are captured. With more, kernels take longer than their
launches, and graphs would only take memory."""
OFTEN = 20
"""Number of parts after which a shape gets its own graph, if the graph of a larger shape can
compute them until then. Most shapes occur only in the last batches of epochs, and capturing takes
long.
"""
WARM_UPS = 2
"""Times that a part is computed before it is captured."""

Result = TypeVar("Result")


def capturable(settings: StepSettings, carryons: int) -> bool:
    """Say whether the steps of so many carry-ons are captured."""
    return settings.cuda_graph and carryons <= MOST


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of a part, and the losses that it writes. It reads the `Buffers`."""

    loss_K: Tensor
    graph: Any


@dataclass(frozen=True, slots=True)
class FinishGraph:
    """The graph of a step's end: the losses that it reads, and the losses and norms it writes."""

    given_K: Tensor
    loss_K: Tensor
    norm_K: Tensor
    graph: Any


class GraphedStack:
    """Takes the steps of a stack by CUDA graphs, if all its carry-ons share a batch of one row.

    The stack computes other parts kernel by kernel. If memory runs out during a capture, ``room``
    becomes False, and all later parts are computed kernel by kernel.

    Without a memory budget, there are graphs of a few padded shapes, and a part uses the smallest
    that holds it. Within a budget, there is a single graph, because each takes the memory of a
    part. If a part does not fit into the graph, a larger one is captured in its place.
    """

    def __init__(self, stack: Stack, device: torch.device):
        self._stack, self._device = stack, device
        self._graphs: dict[Shape, Graph] = {}
        self._buffers: Buffers = {}
        self._seen: Counter[Shape] = Counter()
        self._pool: Any = None
        self._single = stack.settings.part_tokens is not None
        self._done: torch.cuda.Event | None = None
        self.room = True
        self._finish: FinishGraph | None = None
        if stack.ends_alone():
            with self._capturing():
                self._finish = self._capture_finish()

    def prepared(self, work: Sequence[Work]) -> Callable[[], Tensor]:
        """Return a function equivalent to `Stack.differentiate` with this work.

        The losses that the function returns are valid until its next call. A batch for a graph is
        copied now, and not needed after that.
        """
        inputs, shape, copied = work[0].inputs, None, None
        if self.room and all(one.inputs is inputs for one in work) and self._fits(inputs):
            shape = self._shape(inputs)
        if shape in self._graphs or (shape is not None and len(self._graphs) < SHAPES):
            with self._capturing():
                copied = padded(inputs, shape, self._buffers)
        if shape is None or copied is None:
            return self._stack.prepared(work)
        return partial(self._replay, shape, [replace(one, inputs=copied) for one in work])

    def _replay(self, shape: Shape, work: Sequence[Work]) -> Tensor:
        """Replay the graph of a shape; capture it first if the shape is new."""
        if shape not in self._graphs:
            with self._capturing():
                self._graphs[shape] = self._capture(work)
        if shape not in self._graphs:
            return self._stack.differentiate(work)
        found = self._graphs[shape]
        found.graph.replay()
        if not work[0].inputs.batch.last_part:
            self._keep_up()
        return found.loss_K

    def finish(self, loss_K: Tensor) -> tuple[Tensor, Tensor]:
        """Finish a step as `Stack.finish` does; the results are valid until the next call."""
        if self._finish is None:
            return self._stack.finish(loss_K)
        self._finish.given_K.copy_(loss_K)
        self._finish.graph.replay()
        return self._finish.loss_K, self._finish.norm_K

    def _keep_up(self) -> None:
        """Wait for the part before this one, so that later batches do not fill the device."""
        if self._device.type == "cuda":
            before, self._done = self._done, torch.cuda.Event()
            self._done.record()
            if before is not None:
                before.synchronize()

    def _fits(self, inputs: StepInputs) -> bool:
        one_row = inputs.batch.cu_seqlens_M is not None and len(inputs.shortlists) <= 1
        return one_row and not self._stack.streams(inputs)

    def _shape(self, inputs: StepInputs) -> Shape:
        """Return the shape to which a batch is padded for a graph."""
        shape = shape_of(inputs, whole=self._single)
        if self._single:
            for other in self._graphs:
                if other.row == shape.row:
                    shape = other.around(shape)
            if self._graphs and shape not in self._graphs:
                self._drop()
            return shape
        self._seen[shape] += 1
        if self._seen[shape] < OFTEN or len(self._graphs) == SHAPES:
            larger = [other for other in self._graphs if other.holds(shape)]
            return min(larger, key=Shape.logits, default=shape)
        return shape

    def _drop(self) -> None:
        """Free all graphs once the device is done with them."""
        synchronize(self._device)
        self._graphs.clear()
        self._buffers.clear()
        self._pool = None

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Go on without graphs if memory runs out."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.room = False
        if not self.room:
            gc.collect()  # the error held tensors
            self._drop()
            self._finish = None

    def _capture(self, work: Sequence[Work]) -> Graph:
        """Capture a padded part, with weights of 0 so that gradients do not change."""
        with self._stack.zero_weights():
            graph, loss_K = capture(
                lambda: self._stack.differentiate(work),
                self._device,
                self._pool,
                whole=self._single,
            )
        self._pool = graph.pool()
        return Graph(loss_K, graph)

    def _capture_finish(self) -> FinishGraph:
        """Capture the end of a step, with all carry-ons skipped so that weights do not change."""
        given_K = torch.zeros_like(self._stack.optimizer.gradient_KP[:, 0], dtype=torch.float32)
        with self._stack.optimizer.held():
            # It has a pool of its own, so that dropping the parts' graphs frees theirs.
            graph, (loss_K, norm_K) = capture(
                lambda: self._stack.finish(given_K), self._device, None
            )
        return FinishGraph(given_K, loss_K, norm_K, graph)


def capture(
    part: Callable[[], Result], device: torch.device, pool: Any, *, whole: bool = False
) -> tuple[Any, Result]:
    """Capture a function as a CUDA graph.

    The function is first called a few times, so that kernels are compiled, libraries allocate their
    memory, and the memory that the function needs is known.

    Args:
        part: the function.
        device: the device that it computes on.
        pool: memory pool of the graph; None for a new one.
        whole: whether the graph allocates its memory in one piece first. In several pieces, it
            would take 1.5 times as much, because nothing is freed before the capture ends; but
            graphs of one pool can share pieces.

    Returns:
        The graph, and what the function returned.
    """
    here, side = torch.cuda.current_stream(device), _capture_stream(device)
    if whole:
        torch.cuda.empty_cache()  # so that memory of an earlier graph is not counted
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                part()
    finally:  # also where memory ran out: kernels may still add to the gradients
        here.wait_stream(side)
    wanted = _idle_bytes(side) if whole else 0
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Where memory runs out before the first kernel, the error is enough.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with (
            capture_lock,
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            torch.empty(wanted, dtype=torch.uint8, device=device)
            result = part()
    return graph, result


def _idle_bytes(stream: torch.cuda.Stream) -> int:
    """Return the bytes that PyTorch's own allocator keeps for tensors of a stream that has none."""
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
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that graphs of a device are captured on.

    Libraries keep memory for each stream. They allocate it here, so that it does not fragment the
    memory of a part.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.enable_grad():
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
        (ones @ ones).sum().backward()
    return stream
