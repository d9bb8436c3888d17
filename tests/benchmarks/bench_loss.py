"""Cross-entropy through a frozen head, forward and backward, against other implementations.

Each implementation gets the same bfloat16 inputs (float32 on a CPU), a head without gradient, a
mean over positions, and its own defaults. Memory, on a GPU, is the peak above the inputs. The
error of the gradient is measured on 64 positions against float64. Cut-cross-entropy and Liger are
measured if they are installed, ``torch.nn.functional.linear_cross_entropy`` if this version of
torch has it.

    python tests/benchmarks/bench_loss.py [--budget-mib 512 1024]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.base.head import Head
from embedcache.loss import Chunks, linear_cross_entropy, plan_chunks

sys.path.insert(0, str(Path(__file__).parent))
from record import record, row

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = {
    "cuda": {"16,384 × 248,320 × 2,048": (16_384, 248_320, 2048), "SmolLM2": (16_384, 49_152, 576)},
    "cpu": {"SmolLM2, 1,024 positions": (1024, 49_152, 576)},
}
CHECKED = 64
"""Number of positions whose gradient is compared with float64."""


class Measured(NamedTuple):
    """One forward and backward pass: time, memory above inputs, relative error of the gradient."""

    milliseconds: float
    gigabytes: float
    error: float


def ours(x: Tensor, weight: Tensor, targets: Tensor, *, impl: str, chunks: Chunks) -> Tensor:
    return linear_cross_entropy(x, Head(weight), targets, impl=impl, chunks=chunks).mean()


def products_alone(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute only the two matrix products, in the same chunks: the lower bound of the time."""
    rows = plan_chunks(len(x), len(weight), x.dtype, x.device).of_rows(len(x))
    with torch.no_grad():
        gradient = torch.cat([(x[chunk] @ weight.T) @ weight for chunk in rows])
    return (x * gradient).sum()


def naive(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def peers(device: str) -> dict[str, Loss]:
    """Return the implementations that are installed."""
    found: dict[str, Loss] = {"naive torch": naive}
    if device == "cuda":
        found["torch.compile of naive"] = torch.compile(naive)
    if hasattr(F, "linear_cross_entropy"):
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        chunked = {} if options is None else {"options": options()}
        found["torch linear_cross_entropy"] = partial(F.linear_cross_entropy, **chunked)
    if device == "cuda" and (cut := module("cut_cross_entropy")):
        found["cut-cross-entropy"] = cut.linear_cross_entropy
        found["cut-cross-entropy, exact"] = partial(cut.linear_cross_entropy, filter_eps=None)
    if device == "cuda" and (liger := module("liger_kernel.transformers")):
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, weight, targets: fused(weight, x, targets)
    return found


def module(name: str) -> Any:
    """Import a module, or print why that failed and return None."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: not measured: {error}")
        return None


def measure(
    loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, expected: Tensor, seconds: float
) -> Measured:
    """Run a loss for about ``seconds`` after two warm-up rounds; return the median."""
    cuda = x.device.type == "cuda"

    def once() -> float:
        x.grad = None
        started = time.perf_counter()
        loss(x, weight, targets).backward()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    held = 0
    if cuda:
        x.grad = None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    taken = [once()]
    peak = (torch.cuda.max_memory_allocated() - held) / 1e9 if cuda else 0.0
    rounds = max(2, min(50, int(seconds / taken[0])))
    taken = sorted(once() for _ in range(rounds))
    assert x.grad is not None
    difference = x.grad[:CHECKED].double() - expected
    error = (difference.norm() / expected.norm()).item()
    return Measured(1000 * taken[len(taken) // 2], peak, error)


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the first positions in float64."""
    logits = x[:CHECKED].detach().double() @ weight.double().T
    slope = logits.softmax(dim=1)
    slope[torch.arange(CHECKED), targets[:CHECKED]] -= 1
    return (slope @ weight.double()) / len(x)


def evaluation(x: Tensor, weight: Tensor, targets: Tensor, command: str) -> dict[str, Any]:
    """Measure the loss without gradient, as in evaluation, against its matrix product alone."""
    rows = plan_chunks(len(x), len(weight), x.dtype, x.device).rows
    logits = x.new_empty(rows, len(weight))
    rates = []
    with torch.no_grad():
        for work in (
            lambda: linear_cross_entropy(x, Head(weight), targets),
            lambda: torch.mm(x[:rows], weight.T, out=logits),
        ):
            work()
            taken = []
            for _ in range(5):
                started = time.perf_counter()
                work()
                if x.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
            rates.append(min(taken))
    return row(
        "loss without gradient, SmolLM2",
        len(x) / rates[0],
        "tokens/s",
        peer="the product alone",
        peer_value=rows / rates[1],
        command=command,
    )


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--budget-mib", type=int, nargs="+", help="bytes of logits, in MiB, instead of the default"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    command = " ".join(["python tests/benchmarks/bench_loss.py", *sys.argv[1:]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entries = []
    for shape, (N, V, H) in SHAPES[device.type].items():
        torch.manual_seed(0)
        x = torch.randn(N, H, device=device, dtype=dtype).requires_grad_()
        # Logits have standard deviation 3, so that some tokens are likely, as in a language model.
        weight = torch.randn(V, H, device=device, dtype=dtype).mul_(3 * H**-0.5)
        targets = torch.randint(V, (N,), device=device)
        expected = reference(x, weight, targets)
        budgets = [b << 20 for b in options.budget_mib] if options.budget_mib else [None]
        plans = [plan_chunks(N, V, dtype, device, budget=budget) for budget in budgets]
        implementations = ("triton", "torch") if device.type == "cuda" else ("torch",)
        each: dict[str, Loss] = {
            f"ours, {impl}, {plan}": partial(ours, impl=impl, chunks=plan)
            for impl in implementations
            for plan in plans
        }
        each |= {"products alone": products_alone} | peers(device.type)
        measured: dict[str, Measured] = {}
        for name, loss in each.items():
            try:
                measured[name] = measure(loss, x, weight, targets, expected, options.seconds)
            except (RuntimeError, ValueError) as error:  # a peer may run out of memory
                print(f"{name}: not measured: {str(error).splitlines()[0][:100]}")
            else:
                found = measured[name]
                print(
                    f"{shape}: {name}: {found.milliseconds:.2f} ms, {found.gigabytes:.2f} GB, "
                    f"gradient's error {found.error:.1e}",
                    flush=True,
                )
            x.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        best = min(
            (n for n in measured if n.startswith("ours")), key=lambda n: measured[n].milliseconds
        )
        for name, peer in measured.items():
            if name.startswith("ours"):
                continue
            figures = [("ms", "milliseconds")]
            if device.type == "cuda" and name != "products alone":
                figures.append(("GB above inputs", "gigabytes"))
            entries += [
                row(
                    f"loss and gradient, {shape}",
                    getattr(measured[best], figure),
                    unit,
                    peer=name,
                    peer_value=getattr(peer, figure),
                    command=command,
                )
                for unit, figure in figures
            ]
    entries.append(evaluation(x.detach(), weight, targets, command))
    record(f"loss_{'gpu' if device.type == 'cuda' else 'cpu'}", entries, options.results)


if __name__ == "__main__":
    main()
