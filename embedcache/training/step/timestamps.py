"""Timestamps on a device, to measure its idle time."""

from __future__ import annotations

import time

import torch


class Timestamp:
    """The time at which a device finishes all work that was launched so far.

    On a CPU, this is the current time. On a GPU, it is known once the work is finished.
    """

    def __init__(self, device: torch.device):
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def until(self, later: Timestamp) -> float:
        """Return the seconds to a later timestamp; the device must have passed both."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        return self._event.elapsed_time(later._event) / 1e3
