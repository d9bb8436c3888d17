"""Storage formats: bits a value against the rise of the base's cross-entropy.

The test embeddings of a lossless cache are stored in each format and read back. The base's frozen
head then predicts every target from them. The formats are bfloat16, float8 (e4m3, one scale a
token), int8 (one scale a token), int4 (one scale for 32 values), the project's own codings of
bfloat16 and int8, and ``transform`` at several rates, calibrated on the cache's train split. Bits
include scales and exclude the transform's matrices (0.01 bits a value over 1.8 M tokens).

    python examples/paper/rate_quality.py CACHE [--out examples/paper/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from embedcache.base.head import Head
from embedcache.cache.base_arrays import read_token_embedding
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.coders import CODERS
from embedcache.cache.codecs.integers import ARRAYS, STATELESS, Codec
from embedcache.cache.codecs.transform import TransformCodec
from embedcache.data.frozen import FrozenInputs
from embedcache.device import resolve_device
from embedcache.extraction.calibrate import Sample, calibrate
from embedcache.loss import linear_cross_entropy

BUDGETS = (0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
GROUP = 32

Row = dict[str, Any]
Format = Callable[[Sample], tuple[Tensor, float]]
"""Maps a sample to its embeddings as read back and the bits a value."""


def read(cache: Cache, split: str, rows: int) -> Sample:
    """Return about ``rows`` rows, spread evenly over a split."""
    reader = cache.split(split)
    parts: list[tuple[Tensor, Any, Any]] = []
    for number in range(reader.manifest.blocks):
        block = reader.block(number, ("final",))
        targets = np.full(len(block.ids_N), -1)
        for first, stop in block.rows_S2.tolist():
            following = slice(first + 1, stop)
            wanted = block.loss_mask_N[following]
            targets[first : stop - 1] = np.where(wanted, block.ids_N[following], -1)
        parts.append((block.x_NH["final"], block.ids_N, targets))
    step = max(1, sum(len(ids) for _, ids, _ in parts) // rows)
    kept = [(x[::step], ids[::step], targets[::step]) for x, ids, targets in parts]
    x, ids, targets = zip(*kept, strict=True)
    part = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    return Sample(torch.cat(x), np.concatenate(ids), np.concatenate(targets), part)


def scaled(x_NH: Tensor, dtype_max: float) -> tuple[Tensor, Tensor]:
    """Return the rows scaled to a format's range, and the scales."""
    scale_N1 = x_NH.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / dtype_max
    return x_NH.float() / scale_N1, scale_N1


def float8(test: Sample) -> tuple[Tensor, float]:
    """Store as e4m3 with a 16-bit scale a token."""
    values, scale = scaled(test.x_NH, torch.finfo(torch.float8_e4m3fn).max)
    return values.to(torch.float8_e4m3fn).float() * scale, 8 + 16 / test.x_NH.shape[1]


def int8(test: Sample) -> tuple[Tensor, float]:
    """Store as symmetric int8 with a 16-bit scale a token, without entropy coding."""
    values, scale = scaled(test.x_NH, 127)
    return values.round() * scale, 8 + 16 / test.x_NH.shape[1]


def int4(test: Sample) -> tuple[Tensor, float]:
    """Store as symmetric int4 with a 16-bit scale for each group of values."""
    grouped = test.x_NH.unflatten(-1, (-1, GROUP))
    values, scale = scaled(grouped, 7)
    return (values.round() * scale).flatten(-2), 4 + 16 / GROUP


def stored(codec: Codec, name: str) -> Format:
    """Return a codec of this project, with the coding of its shards, as a format."""

    def through(test: Sample) -> tuple[Tensor, float]:
        integers = codec.encode(test.x_NH, test.ids_N)
        size = sum(
            len(CODERS[spec.coder].encode(integers[spec.group].cpu().numpy()))
            for spec in ARRAYS[name]
        )
        return codec.decode(integers, test.ids_N), 8 * size / test.x_NH.numel()

    return through


def formats(cache: Cache, head: Head, rows: int) -> Iterator[tuple[str, Format]]:
    """Yield the name and the function of each format."""
    yield "bf16, as it is", lambda test: (test.x_NH, 16.0)
    yield "bf16, here", stored(STATELESS["bf16"], "bf16")
    yield "float8", float8
    yield "int8, as it is", int8
    yield "int8, here", stored(STATELESS["int8"], "int8")
    yield "int4", int4
    embedding_VH = read_token_embedding(cache.path)
    train = read(cache, "train", rows).to(head.weight_VH.device)
    for bits in BUDGETS:
        found = calibrate(train, embedding_VH, head=head, bits=bits)
        codec = TransformCodec(found, embedding_VH)
        yield f"transform, {bits:g} bits asked", stored(codec, "transform")


def base_loss(x_NH: Tensor, test: Sample, head: Head) -> float:
    """Return the base's mean cross-entropy over the rows with a target."""
    wanted = torch.from_numpy(np.flatnonzero(test.targets_N >= 0)).to(x_NH.device)
    targets_N = torch.from_numpy(test.targets_N).to(x_NH.device)[wanted]
    return float(
        linear_cross_entropy(x_NH[wanted].to(head.weight_VH.dtype), head, targets_N).mean()
    )


def picture(rows: list[Row]) -> Figure:
    """Plot the rise against the rate; lossless formats are drawn at the bottom."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    foot = 3e-4
    line = [row for row in rows if row["format"].startswith("transform")]
    axes.plot(
        [row["bits_a_value"] for row in line],
        [max(foot, row["rise"]) for row in line],
        "o-",
        color="tab:blue",
        label="transform",
    )
    for row in rows:
        if row not in line:
            at = (row["bits_a_value"], max(foot, row["rise"]))
            here = "here" in row["format"]
            axes.plot(*at, "s" if here else "x", color="tab:blue" if here else "0.4")
            axes.annotate(row["format"], at, (4, 6), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits a value on disk")
    axes.set_ylabel("rise of the base's test cross-entropy (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Measure every format; write ``rate_quality.json`` and ``rate_quality.png``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, help="a cache of codec bf16")
    parser.add_argument("--rows", type=int, default=65_536, help="train rows to calibrate on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cache, device = Cache(options.cache), resolve_device("auto")
    head = FrozenInputs(cache, device).head
    test = read(cache, "test", 1 << 40)
    test = Sample(test.x_NH.to(device), test.ids_N, test.targets_N, test.part_N)
    exact = base_loss(test.x_NH, test, head)
    rows: list[Row] = []
    for name, through in formats(cache, head, options.rows):
        x_NH, bits = through(test)
        loss = base_loss(x_NH.to(torch.bfloat16), test, head)
        row = {"format": name, "bits_a_value": round(bits, 3), "rise": round(loss - exact, 5)}
        rows.append(row | {"base_test": round(exact, 4), "rows": len(test.ids_N)})
        print(json.dumps(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rate_quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    picture(rows).savefig(options.out / "rate_quality.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
