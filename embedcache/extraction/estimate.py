"""Estimating the bytes and the time of an extraction from a few blocks of it.

Batches from all over the corpus are computed, encoded and written to a scratch folder with the
parts that the run uses. Their cost is extrapolated, and what is known exactly is added.

Axes: N rows of a trial block, H hidden.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import zarr

from embedcache.base.forward import CHECK_EVERY, BlockForward
from embedcache.base.load import Base
from embedcache.cache.base_arrays import CHUNK_ROWS as BASE_CHUNK_ROWS
from embedcache.cache.base_arrays import write_base_array
from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.codecs.integers import Codec, codec_name
from embedcache.cache.format.arrays import CHUNK_ROWS
from embedcache.cache.format.layout import MANIFEST, TOKENS_DIGESTS, ExtractSettings, marker_path
from embedcache.cache.manifest.digest_table import digest_table_bytes
from embedcache.cache.manifest.file_record import FILE
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import used_bytes
from embedcache.device import synchronize
from embedcache.errors import OutputError
from embedcache.extraction.encode import BlockEncoder, HostBuffers, Slot
from embedcache.extraction.sample import BlockId, ComputedBatches, SampledBatch, sample_batches
from embedcache.progress import Progress
from embedcache.store.files import free_disk
from embedcache.units import format_bytes, format_seconds

MIN_TOKENS = 2048
MIN_BATCHES = 4
MAX_SECONDS = 15.0
"""Sampling stops after this many seconds once it has ``MIN_TOKENS``."""
QUICK_SECONDS = 3.0
"""A sample that took less is timed a second time: the first pass includes one-time costs."""
MAX_BLOCKS = 8
"""Largest number of trial blocks for each codec."""
BASE_CHUNKS = 8
"""Number of chunks of an array of the base that are written to estimate its size."""
MANIFEST_BYTES = 8000
"""Approximate size of the manifest without the digests of the tokens."""


class RoomError(OutputError):
    """The disk has less room than the cache needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The expected size and duration of an extraction."""

    tokens: dict[str, int]
    """Tokens of the cache by split."""
    tokens_to_go: int
    """Tokens of the blocks that are not committed yet."""
    bytes: int
    """Bytes of all files of the finished cache."""
    bytes_to_go: int
    """Bytes that are still to be written."""
    seconds: float
    """Seconds from the moment the base is loaded to the commit of the last block."""
    tokens_per_second: float
    measured_tokens: int
    """Tokens of the sample that the estimate is extrapolated from."""
    free_bytes: int
    """Free bytes of the disk."""

    def __str__(self) -> str:
        """Return the estimate as one line."""
        whole = (
            f" ({format_bytes(self.bytes)} when finished)" if self.bytes_to_go < self.bytes else ""
        )
        return (
            f"{self.tokens_to_go:,} tokens to go: about {format_bytes(self.bytes_to_go)} to write"
            f"{whole}, {format_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s; "
            f"{format_bytes(self.free_bytes)} of disk free"
        )

    def require_room(self, out: Path) -> None:
        """Raise ``RoomError`` if the disk has less free space than is still to be written."""
        if self.bytes_to_go > self.free_bytes:
            raise RoomError(
                f"the cache needs about {self.bytes_to_go / 1e9:.2f} GB more and the disk of {out} "
                f"has {self.free_bytes / 1e9:.2f} GB free: use another `out=`, `codec=` 'int8' or "
                "'transform', or `limit_tokens=`"
            )


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes and seconds that it takes to store something."""

    bytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecCost:
    """The cost of encoding and committing blocks with the codec of one split."""

    token_bytes: float
    block_bytes: float
    """Bytes of a block without tokens, its marker included."""
    encode_seconds: float
    """Seconds a token to encode on the device and copy to the host, top ids included."""
    commit_seconds: float
    """Seconds a token to compress, hash, write and flush, on one thread."""
    commit_cpu_seconds: float
    """CPU time of that."""
    arrays: int
    """Number of shards of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the sampled batches took."""

    tokens: int = 0
    forward_seconds: float = 0.0
    """Seconds a token of the forward pass."""
    codecs: dict[str, CodecCost] = field(default_factory=dict)
    """By split."""


FREE = Cost()
NO_TRIAL = Trial()
"""Where there is nothing to compute."""


def commit_threads(device: torch.device) -> int:
    """Return how many threads commit blocks beside the forward pass.

    A CPU that also runs the forward pass has one. A GPU would wait for a single one.
    """
    return 1 if device.type == "cpu" else min(4, os.cpu_count() or 1)


def tokens_of(splits: dict[str, SplitTokens], blocks: list[BlockId]) -> dict[str, int]:
    """Return the number of tokens in ``blocks`` by split."""
    if len(blocks) == sum(split.blocks for split in splits.values()):
        return {name: split.totals["tokens"] for name, split in splits.items()}
    found = dict.fromkeys(splits, 0)
    for name, block in blocks:
        found[name] += splits[name].block_rows(block)
    return found


def run_trial(
    base: Base,
    forward: BlockForward,
    splits: dict[str, SplitTokens],
    blocks: list[BlockId],
    settings: ExtractSettings,
    codecs: dict[str, dict[str, Codec]],
    computed: ComputedBatches,
    progress: Progress,
    scratch: Path | None = None,
) -> Trial:
    """Compute, encode and write a sample of the blocks to compute.

    Args:
        base: the loaded base.
        forward: its forward pass.
        splits: the tokens of each split.
        blocks: the blocks to compute.
        settings: the settings of the extraction.
        codecs: codecs by tap, by split.
        computed: receives the embeddings of the sampled batches.
        progress: shows a bar.
        scratch: folder for the trial blocks, on the disk of the cache. The default is the system's
            temporary folder.
    """
    blocks = [(name, block) for name, block in blocks if splits[name].block_rows(block)]
    if not blocks:
        return Trial()
    sample: list[tuple[SampledBatch, dict[str, torch.Tensor]]] = []
    seconds = 0.0
    with progress.bar("measuring", None, "tok") as bar:
        for batch in sample_batches(splits, blocks, forward):
            if not sample:  # the first forward pass of a process is slow
                first = batch.rows_B2[:1].copy()
                first[:, 1] = np.minimum(first[:, 1], first[:, 0] + 64)
                forward.batch(batch.ids_N, first)
                synchronize(base.device)
            started = time.perf_counter()
            x_BTH = forward.batch(batch.ids_N, batch.rows_B2)
            synchronize(base.device)
            seconds += time.perf_counter() - started
            x_NH = {tap: batch.unpadded(x) for tap, x in computed.add(batch, x_BTH).items()}
            sample.append((batch, x_NH))
            bar.advance(len(batch))
            enough = len(sample) >= MIN_BATCHES or seconds > MAX_SECONDS
            if enough and sum(len(taken) for taken, _ in sample) >= MIN_TOKENS:
                break
        tokens = sum(len(batch) for batch, _ in sample)
        again = forward if seconds < QUICK_SECONDS else None
        costs: dict[str, tuple[CodecCost, float | None]] = {}
        for name in dict(blocks):
            codec = codec_name(name, settings.codec)
            if codec not in costs:
                encoder = BlockEncoder(name, settings, codecs[name], base.head)
                costs[codec] = _codec_cost(
                    base.device, name, encoder, sample, settings, again, scratch
                )
    repeated = [forward_seconds for _, forward_seconds in costs.values() if forward_seconds]
    return Trial(
        tokens=tokens,
        forward_seconds=min([seconds / tokens, *repeated]),
        codecs={name: costs[codec_name(name, settings.codec)][0] for name in dict(blocks)},
    )


def _codec_cost(
    device: torch.device,
    split: str,
    encoder: BlockEncoder,
    sample: list[tuple[SampledBatch, dict[str, torch.Tensor]]],
    settings: ExtractSettings,
    forward: BlockForward | None,
    scratch: Path | None,
) -> tuple[CodecCost, float | None]:
    """Encode and commit the sample as blocks.

    With ``forward``, its batches are computed again meanwhile, as in a run, and their seconds a
    token are returned: threads that commit slow down the thread that launches kernels.
    """
    threads = commit_threads(device)
    buffers = HostBuffers(device, threads + 1)
    encode_seconds, rows, forward_seconds, forward_tokens = 0.0, 0, 0.0, 0
    with (
        tempfile.TemporaryDirectory(prefix="embedcache-", dir=scratch) as folder,
        closing(BlockWriter(Path(folder))) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):

        def commit(block: int, slot: Slot) -> tuple[int, float, float]:
            """Commit a block; return its bytes, the seconds and the CPU seconds."""
            started, cpu = time.perf_counter(), time.thread_time()
            arrays = {p: (encoder.specs[p], values.numpy()) for p, values in slot.arrays.items()}
            marker = writer.commit(split, block, arrays)
            slot.release()
            taken = time.perf_counter() - started, time.thread_time() - cpu
            return sum(record.bytes for record in marker.files), *taken

        def encoded(x_NH: dict[str, torch.Tensor], ids_N: np.ndarray) -> Slot:
            on_device = {tap: x.to(device) for tap, x in x_NH.items()}
            return buffers.fetch(*encoder(on_device, ids_N, len(ids_N)))()

        trial_blocks = _trial_blocks(sample, settings.block_tokens)
        encoded(*trial_blocks[0]).release()  # its memory is new
        futures = []
        for number, (x_NH, ids_N) in enumerate(trial_blocks):
            if forward is not None:
                started = time.perf_counter()
                for batch, _ in sample[number :: len(trial_blocks)]:
                    forward.batch(batch.ids_N, batch.rows_B2)
                    forward_tokens += len(batch)
                synchronize(device)
                forward_seconds += time.perf_counter() - started
            started = time.perf_counter()
            slot = encoded(x_NH, ids_N)
            encode_seconds += time.perf_counter() - started
            rows += len(ids_N)
            futures.append(pool.submit(commit, number, slot))
        commits = [future.result() for future in futures]
        x_NH, _ = trial_blocks[0]
        empty = {tap: x.new_zeros(settings.block_tokens, x.shape[1]) for tap, x in x_NH.items()}
        slot = encoded(empty, np.zeros(settings.block_tokens, np.int64))
        for values in slot.arrays.values():
            values.zero_()
        empty_bytes, _, _ = commit(len(commits), slot)
        marker_bytes = marker_path(Path(folder), split, len(commits)).stat().st_size
    total, seconds, cpu_seconds = (sum(column) for column in zip(*commits, strict=True))
    cost = CodecCost(
        token_bytes=total / rows - empty_bytes / settings.block_tokens,
        block_bytes=empty_bytes + marker_bytes,
        encode_seconds=encode_seconds / rows,
        commit_seconds=seconds / rows,
        commit_cpu_seconds=cpu_seconds / rows,
        arrays=len(encoder.specs),
    )
    return cost, forward_seconds / forward_tokens if forward_tokens else None


def _trial_blocks(
    sample: list[tuple[SampledBatch, dict[str, torch.Tensor]]], block_tokens: int
) -> list[tuple[dict[str, torch.Tensor], np.ndarray]]:
    """Cut the sample into blocks: x_NH by tap and ids_N of each.

    A smaller sample is one smaller block of whole chunks.
    """
    ids_N = np.concatenate([batch.ids() for batch, _ in sample])
    x_NH = {tap: torch.cat([x[tap] for _, x in sample]) for tap in sample[0][1]}
    keep = x_NH[next(iter(x_NH))].float().sum(dim=1).isfinite()
    if keep.any():
        ids_N, x_NH = ids_N[keep.numpy()], {tap: x[keep] for tap, x in x_NH.items()}
    rows = min(block_tokens, len(ids_N))
    if CHUNK_ROWS <= rows < block_tokens:
        rows -= rows % CHUNK_ROWS
    return [
        ({tap: x[start : start + rows] for tap, x in x_NH.items()}, ids_N[start : start + rows])
        for start in range(0, len(ids_N) - rows + 1, rows)
    ][:MAX_BLOCKS]


def stored_cost(tensors: Mapping[str, torch.Tensor], scratch: Path | None) -> Cost:
    """Return the cost of storing arrays beside the blocks, by writing some chunks of each."""
    total_bytes, total_seconds = 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="embedcache-", dir=scratch) as folder:
        group = zarr.create_group(Path(folder), zarr_format=3)
        for name, tensor in tensors.items():
            chunks = tensor.split(BASE_CHUNK_ROWS)
            sampled = sorted({len(chunks) * i // BASE_CHUNKS for i in range(BASE_CHUNKS)})
            part = torch.cat([chunks[number] for number in sampled])
            started = time.perf_counter()
            write_base_array(group, name, part)
            share = len(tensor) / len(part)
            total_seconds += (time.perf_counter() - started) * share
            files = [path for path in (Path(folder) / name).rglob("*") if path.is_file()]
            total_bytes += sum(path.stat().st_size for path in files) * share
    return Cost(total_bytes, total_seconds)


def estimate(
    folder: Path,
    splits: dict[str, SplitTokens],
    blocks: list[BlockId],
    *,
    device: torch.device,
    out: Path,
    trial: Trial = NO_TRIAL,
    stored: Cost = FREE,
    computed_tokens: int = 0,
    spent: float = 0.0,
) -> Estimate:
    """Extrapolate a trial to all blocks that are to be computed.

    Args:
        folder: the folder that holds the tokens and what else is finished.
        splits: the tokens of each split.
        blocks: the blocks to compute.
        device: the device that computes them.
        out: the folder of the cache, for the free space of its disk.
        trial: the cost of a sample of the blocks.
        stored: the cost of the arrays of the base and the codec that are not stored yet.
        computed_tokens: number of tokens whose embeddings are already computed.
        spent: seconds since the base was loaded.
    """
    tokens = tokens_of(splits, blocks)
    count = sum(tokens.values())
    there, to_go = used_bytes(folder), stored.bytes
    compute, commit, last = 0.0, 0.0, 0.0
    for name, cost in trial.codecs.items():
        number = sum(split == name for split, _ in blocks)
        to_go += tokens[name] * cost.token_bytes + number * cost.block_bytes
        to_go += digest_table_bytes(splits[name].blocks * cost.arrays, FILE)
        compute += tokens[name] * cost.encode_seconds
        commit += tokens[name] * cost.commit_seconds
        last = max(last, tokens[name] / number * cost.commit_seconds)
        if device.type == "cpu":  # the forward pass and the commits share the cores
            compute += tokens[name] * cost.commit_cpu_seconds
    if not (folder / MANIFEST).is_file():
        to_go += MANIFEST_BYTES + (folder / TOKENS_DIGESTS).stat().st_size
    sequences = max(1, sum(split.totals["sequences"] for split in splits.values()))
    mean_length = sum(split.totals["tokens"] for split in splits.values()) / sequences
    checked = (2 + len(blocks) // CHECK_EVERY) * mean_length if blocks else 0
    compute += (max(0, count - computed_tokens) + checked) * trial.forward_seconds
    seconds = spent + stored.seconds + max(compute, commit / commit_threads(device)) + last
    return Estimate(
        tokens={name: split.totals["tokens"] for name, split in splits.items()},
        tokens_to_go=count,
        bytes=int(there + to_go),
        bytes_to_go=int(to_go),
        seconds=round(seconds, 3),
        tokens_per_second=round(count / seconds, 1) if seconds else 0.0,
        measured_tokens=trial.tokens,
        free_bytes=free_disk(out),
    )
