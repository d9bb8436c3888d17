"""Moments of a device's work: how long it had none."""

from __future__ import annotations

import time

import torch


class Timestamp:
    """The moment at which a device is done with all that was launched on it so far.

    A CPU is, at once. A GPU's is known when its work has come as far.
    """

    def __init__(self, device: torch.device):
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def until(self, later: Timestamp) -> float:
        """Return the seconds from here to a later mark, both of which the device has passed."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        return self._event.elapsed_time(later._event) / 1e3
