"""Work of a known length that holds the interpreter's lock, as launching kernels does."""

from __future__ import annotations

import time


def spin(seconds: float) -> None:
    """Compute for so much of a core, however long it takes to get the lock and the core."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass
