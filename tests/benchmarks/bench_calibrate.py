"""Time and memory of calibrating the ``transform`` codec, at the shapes of real bases.

Rows, head and token embedding are random: neither time nor memory depends on their values. The peer
is the base's forward pass over the same rows. Its time is computed from two floating-point
operations for each parameter and token, at this device's measured rate for a large matrix product
in the dtype of extraction. Memory is the allocator's on a GPU, and the process's on a CPU.

    python tests/benchmarks/bench_calibrate.py [--shapes SmolLM2 32B]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from embedcache.base.head import Head
from embedcache.device import fast_dtype
from embedcache.extraction.calibrate import ROWS_PER_COMPONENT, SAMPLE_ROWS, Sample, calibrate

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

SHAPES = {
    "SmolLM2": (576, 49_152, 134.5e6),
    "7B": (3584, 152_064, 7.6e9),
    "32B": (5120, 152_064, 32.8e9),
}
"""Hidden size, vocabulary, parameters."""


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident(what: str) -> int:
    """Return this process's resident bytes: now (``VmRSS``) or at their peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(2):
        a @ a
    sync()
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    sync()
    return 5 * 2 * size**3 / (time.perf_counter() - started)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = fast_dtype(device)
    rate = product_rate(device, dtype)
    rows = []
    for name in options.shapes:
        H, V, parameters = SHAPES[name]
        N = max(SAMPLE_ROWS, ROWS_PER_COMPONENT * H)
        torch.manual_seed(0)
        head = Head((torch.randn(V, H, device=device) * H**-0.5).to(dtype))
        embedding_VH = torch.randn(V, H, dtype=torch.bfloat16)
        spread_H = torch.logspace(0, -1.5, H, device=device)
        ids_N = np.random.default_rng(0).integers(V, size=N)
        sample = Sample(
            torch.randn(N, H, device=device) * spread_H,
            ids_N,
            np.roll(ids_N, -1),
            np.arange(N) // 4096,
        )
        sync()
        held = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = calibrate(sample, embedding_VH, head=head, bits=1.5)
        sync()
        seconds = time.perf_counter() - started
        forward = 2 * parameters * N / rate
        command = f"python tests/benchmarks/bench_calibrate.py --shapes {name}"
        peer = "forward pass over the same rows, at the rate of a large product"
        rows.append(
            row(
                f"calibrating transform, {name}",
                seconds,
                "s",
                peer=peer,
                peer_value=forward,
                command=command,
            )
        )
        peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        rows.append(
            row(
                f"calibrating transform, {name}: peak memory above base and sample",
                (peak - held) / 1e9,
                "GB",
                peer="the sample in float32",
                peer_value=sample.x_NH.nbytes / 1e9,
                command=command,
            )
        )
        print(rows[-1], found.measured, flush=True)
        del sample, head, found
    record(f"calibrate_{'gpu' if cuda else 'cpu'}", rows, options.results)


if __name__ == "__main__":
    main()
