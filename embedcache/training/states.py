"""What AdamW keeps of a stack's weights, on their device or in host memory.

Axes: K carry-ons, P weights of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXACT = "exact"
CHUNK = 1 << 20
"""Weights of which the states are on the device at a time, where they are kept on the host."""
SLOTS = 3
"""Chunks on the device at a time: one comes, one is worked on, one goes."""


class Window(NamedTuple):
    """The states of some weights of one carry-on, on the device, to be changed in place."""

    row: int
    part: slice
    exact: Tensor
    mean: Tensor
    square: Tensor


class States:
    """Exact weights, means and squares of gradients, each float32 [K, P].

    ``in_place``: the exact weights are the values themselves.
    """

    def __init__(self, exact_KP: Tensor, values_KP: Tensor, *, offload: bool):
        """Begin with these weights; ``values_KP`` are those of the model, on the device."""
        device = values_KP.device
        self._offload = offload
        self.in_place = not offload and values_KP.dtype == exact_KP.dtype
        home = torch.device("cpu") if offload else device
        pinned = offload and device.type == "cuda"

        def made() -> Tensor:
            return torch.zeros(exact_KP.shape, device=home, pin_memory=pinned)

        exact = values_KP if self.in_place else made().copy_(exact_KP)
        self._parts = [exact, made(), made()]
        self._kit: Any = torch.get_device_module(device)  # streams, which a CPU has in name only
        if offload:
            self._slots = torch.empty(SLOTS, 3, CHUNK, device=device)
            self._coming, self._going = self._kit.Stream(), self._kit.Stream()

    def row(self, index: int) -> dict[str, Tensor]:
        """Return one carry-on's states, by name, as views."""
        if self._offload:
            self._kit.synchronize()
        names = (EXACT, "exp_avg", "exp_avg_sq")
        rows = {name: part[index] for name, part in zip(names, self._parts, strict=True)}
        if self.in_place:
            del rows[EXACT]
        return rows

    def over(self, spans: Sequence[tuple[int, slice]]) -> Iterator[Window]:
        """Yield the states of each span of a carry-on's weights; each is valid until the next.

        Those on the host are brought chunk by chunk, and taken back, while others are worked on.
        """
        if not self._offload:
            for k, part in spans:
                yield Window(k, part, *(state[k, part] for state in self._parts))
            return
        chunks = [
            (k, slice(start, min(start + CHUNK, part.stop)))
            for k, part in spans
            for start in range(part.start, part.stop, CHUNK)
        ]
        here = self._kit.current_stream()
        self._coming.wait_stream(here)
        coming = [self._bring(0, *chunks[0])] if chunks else []
        for number, (k, part) in enumerate(chunks):
            window = coming.pop()
            here.wait_stream(self._coming)
            if number + 1 < len(chunks):
                coming.append(self._bring(number + 1, *chunks[number + 1]))
            yield window
            self._going.wait_stream(here)
            with self._kit.stream(self._going):
                for state, found in zip(self._parts, window[2:], strict=True):
                    state[k, part].copy_(found, non_blocking=True)
        here.wait_stream(self._going)

    def _bring(self, number: int, k: int, part: slice) -> Window:
        """Copy a chunk into its slot, once what was there before has gone back."""
        if number >= SLOTS:
            self._coming.wait_stream(self._going)
        slots = self._slots[number % SLOTS, :, : part.stop - part.start]
        with self._kit.stream(self._coming):
            for slot, state in zip(slots, self._parts, strict=True):
                slot.copy_(state[k, part], non_blocking=True)
        return Window(k, part, *slots)
