"""Stage one: run a frozen base once over a corpus and write its embeddings to a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.base.load import Base, load_base, load_identity, load_tokenizer
from embedcache.base.taps import check_taps
from embedcache.cache.codecs import codec_for
from embedcache.cache.commit import (
    BlockWriter,
    Marker,
    clear_staging,
    drop_superseded,
    newest_generations,
    recover,
)
from embedcache.cache.layout import MANIFEST, SPLITS, ExtractSettings
from embedcache.cache.manifest import (
    Manifest,
    publish_manifest,
    read_manifest,
    split_manifest,
)
from embedcache.cache.prefetch import prefetch
from embedcache.cache.sealed import Seal, read_seal
from embedcache.cache.tokens import SplitTokens
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device, resolve_dtype
from embedcache.errors import NumericsError
from embedcache.extraction.buffers import HostBuffers, Slot
from embedcache.extraction.forward import BlockForward
from embedcache.extraction.plan import (
    Prediction,
    check_out,
    count_tokens,
    environment_of,
    predict,
    seal_corpus,
    sealed_attributes,
)
from embedcache.extraction.repair import Mended, mend, restore_metadata
from embedcache.extraction.store_base import store_base
from embedcache.files import LOCK, writer_lock
from embedcache.progress import SILENT, Bar, Progress

CHECK_EVERY = 64
"""Blocks between self-checks; the first block is always checked."""

QUARANTINE_GRACE = 8
"""Sequences that may be quarantined before their share is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What an extraction did. Speeds count this run's blocks only; bytes are of the whole cache."""

    out: str
    base: str
    documents: dict[str, int]
    sequences: dict[str, int]
    tokens: dict[str, int]
    bytes: int
    bytes_per_token: float
    predicted_bytes: int
    blocks: int
    resumed_blocks: int
    quarantined: int
    self_check: float
    seconds: float
    tokens_per_second: float
    corpus: dict[str, Any]


def preview(
    corpus: CorpusConfig,
    *,
    base: str,
    out: Path,
    settings: ExtractSettings,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> tuple[Prediction, dict[str, Any]]:
    """Return what an extraction would hold and need; reads the corpus, writes nothing."""
    check_out(out)
    identity = load_identity(base, revision=revision)
    check_taps(settings.taps, identity.num_layers)
    reader = count_tokens(corpus, load_tokenizer(base, revision=revision), progress)
    summary = asdict(reader.summary)
    return predict(summary["tokens"], settings, identity, out), summary


def extract(
    corpus: CorpusConfig,
    *,
    base: str,
    out: Path,
    settings: ExtractSettings | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_quarantined: float = 0.01,
    repair: bool = False,
    progress: Progress = SILENT,
) -> ExtractSummary:
    """Extract a corpus into the cache at ``out``, or go on with one that was interrupted.

    Args:
        corpus: what to read, how to render and split it.
        base: a hub id, a local directory, a GGUF file or ``builtin:NAME``.
        out: an absent or empty folder, or a cache begun with the same request.
        settings: taps, codec, and sizes of blocks and batches.
        revision: the hub revision of the base.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto`` (bfloat16 on CUDA, else float32), or a name.
        max_quarantined: share of sequences that may be put aside for values that are not finite.
        repair: verify what is at ``out`` first, all of it, and make what is damaged anew.
        progress: told of every stage.

    Returns:
        The counts, sizes and speed. A cache that is already complete is left as it is.

    Raises:
        EmbedcacheError: for anything a user can mend; see the modules concerned.
    """
    settings = settings or ExtractSettings(context=corpus.context)
    if not repair:
        check_out(out)
    identity = load_identity(base, revision=revision)
    check_taps(settings.taps, identity.num_layers)
    target = resolve_device(device)
    environment = environment_of(target, resolve_dtype(dtype, target), "sdpa")
    created = not out.exists()
    with writer_lock(out):
        try:
            if repair:
                restore_metadata(out)
            attributes = sealed_attributes(out, corpus, identity, settings, environment)
            if attributes is None:
                tokenizer = load_tokenizer(base, revision=revision)
                attributes = seal_corpus(
                    corpus, tokenizer, identity, settings, environment, out, progress
                )
        except BaseException:
            if not (out / "zarr.json").is_file():
                (out / LOCK).unlink(missing_ok=True)
                if created:
                    with suppress(OSError):  # another process may have begun there
                        out.rmdir()
            raise
        mended = None
        if repair:
            mended = mend(
                out, corpus, lambda: load_tokenizer(base, revision=revision), settings, progress
            )
        run = _Extraction(out, attributes.corpus["summary"], settings, max_quarantined, progress)
        if mended is not None or not (out / MANIFEST).is_file():
            run.compute(
                lambda: load_base(base, revision=revision, device=device, dtype=dtype), mended
            )
        return run.summary(identity.name, predict(run.tokens, settings, identity, out).bytes)


class _Extraction:
    """One run over the blocks that have no marker yet."""

    def __init__(
        self,
        out: Path,
        corpus_summary: dict[str, Any],
        settings: ExtractSettings,
        max_quarantined: float,
        progress: Progress,
    ):
        self._out = out
        self._corpus_summary = corpus_summary
        self._settings = settings
        self._max_quarantined = max_quarantined
        self._progress = progress
        self._splits = {name: SplitTokens(out, name, settings.block_tokens) for name in SPLITS}
        self.tokens = {name: split.totals["tokens"] for name, split in self._splits.items()}
        self._resumed = 0
        self._seen = 0
        self._quarantined = 0

    def compute(self, load: Callable[[], Base], mended: Mended | None = None) -> None:
        """Compute every block without a sound marker and publish the manifest."""
        out, progress = self._out, self._progress
        markers = (
            {name: recover(out, name, split.blocks) for name, split in self._splits.items()}
            if mended is None
            else mended.markers
        )
        clear_staging(out)
        self._resumed = sum(len(done) for done in markers.values())
        for name, done in markers.items():
            for marker in done.values():
                self._count(name, marker)
        self._check_quarantined(QUARANTINE_GRACE)
        todo = [
            (name, block)
            for name, split in self._splits.items()
            for block in range(split.blocks)
            if block not in markers[name]
        ]
        if self._resumed:
            progress.say(f"resuming: {self._resumed} blocks are there, {len(todo)} to go")
        worst, tokens, seconds = 0.0, 0, 0.0
        again = mended is not None and mended.base
        if todo or again or not (out / "base").is_dir():
            with progress.bar("loading the base", None, "") as _:
                base = load()
            store_base(out, base, again=again)
            worst, tokens, seconds = self._forward(base, todo, markers)
        self._check_quarantined(min(QUARANTINE_GRACE, self._seen // 2))
        manifest = Manifest(
            splits={
                name: split_manifest(split.totals, markers[name], split.blocks)
                for name, split in self._splits.items()
            },
            sealed=read_seal(out),
            base=Seal.of(out, out / "base"),
            extracted=(mended and mended.extracted)
            or {
                "self_check": worst,
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            },
        )
        publish_manifest(out, manifest)
        for name in self._splits:
            drop_superseded(out, name)
        clear_staging(out)

    def _forward(
        self, base: Base, todo: list[tuple[str, int]], markers: dict[str, dict[int, Marker]]
    ) -> tuple[float, int, float]:
        settings = self._settings
        forward = BlockForward(
            base,
            settings.taps,
            block_tokens=settings.block_tokens,
            batch_tokens=settings.batch_tokens,
        )
        writer = BlockWriter(self._out)
        newest = {name: newest_generations(self._out, name) for name in self._splits}
        # Encoding runs beside the forward pass: one thread where the CPU is the device, a few
        # where a GPU would otherwise wait for zstd.
        threads = 1 if base.device.type == "cpu" else min(4, os.cpu_count() or 1)
        slots = HostBuffers(base, settings, count=threads + 1)
        futures: list[tuple[str, int, int, Future[Marker]]] = []
        total = sum(self._splits[name].block_rows(block) for name, block in todo)
        worst, started = 0.0, time.perf_counter()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        try:
            with self._progress.bar("extracting", total, "tok") as bar:
                read = ((*item, *self._splits[item[0]].read(item[1])) for item in todo)
                for number, (name, block, ids_N, rows_S2, first) in enumerate(prefetch(read)):
                    x_NH = forward(ids_N, rows_S2)
                    if number % CHECK_EVERY == 0:
                        sample = 2 if number == 0 else 1
                        worst = max(worst, forward.check(ids_N, rows_S2, x_NH, sample))
                    ready = slots.fetch(x_NH)
                    generation = newest[name].get(block, -1) + 1
                    future = pool.submit(
                        self._write, writer, name, block, generation, ready, rows_S2, first
                    )
                    futures.append((name, block, int(rows_S2[-1, 1]), future))
                    futures = self._settle(futures, markers, bar, wait=False)
                self._settle(futures, markers, bar, wait=True)
        finally:
            pool.shutdown(wait=True)
            writer.close()
        seconds = time.perf_counter() - started
        return worst, total, seconds

    def _write(
        self,
        writer: BlockWriter,
        name: str,
        block: int,
        generation: int,
        ready: Callable[[], Slot],
        rows_S2: np.ndarray[Any, Any],
        first: int,
    ) -> Marker:
        slot = ready()
        try:
            bad = [i for i, (a, b) in enumerate(rows_S2.tolist()) if not slot.finite_N[a:b].all()]
            arrays: dict[str, np.ndarray[Any, Any]] = {}
            codec = codec_for(name, self._settings.codec)
            for tap, x_NH in slot.x_NH.items():
                for index in bad:
                    x_NH[rows_S2[index, 0] : rows_S2[index, 1]] = 0
                for group, values in codec.encode(x_NH).items():
                    arrays[f"{group}/{tap}"] = values
            quarantined = tuple(first + index for index in bad)
            return writer.commit(
                name, block, arrays, quarantined=quarantined, generation=generation
            )
        finally:
            slot.release()

    def _settle(
        self,
        futures: list[tuple[str, int, int, Future[Marker]]],
        markers: dict[str, dict[int, Marker]],
        bar: Bar,
        *,
        wait: bool,
    ) -> list[tuple[str, int, int, Future[Marker]]]:
        """Take note of the blocks that are committed; return those that are not."""
        pending = []
        for name, block, rows, future in futures:
            if not wait and not future.done():
                pending.append((name, block, rows, future))
                continue
            marker = future.result()
            markers[name][block] = marker
            self._count(name, marker)
            bar.advance(rows, f"{sum(record.bytes for record in marker.files) / 1e6:.1f} MB/block")
            self._check_quarantined(QUARANTINE_GRACE)
        return pending

    def _count(self, name: str, marker: Marker) -> None:
        starts = self._splits[name].block_starts
        self._seen += int(starts[marker.block + 1] - starts[marker.block])
        self._quarantined += len(marker.quarantined)

    def _check_quarantined(self, grace: int) -> None:
        if self._quarantined > max(grace, self._max_quarantined * self._seen):
            raise NumericsError(
                f"{self._quarantined} of the first {self._seen} sequences gave embeddings that "
                f"are not finite, expected at most {self._max_quarantined:.2%}: the base "
                "overflows. Try --dtype float32 or bfloat16 and another --out, or allow more with "
                "--max-quarantined."
            )

    def summary(self, base: str, predicted: int) -> ExtractSummary:
        """Return the counts and sizes of the finished cache."""
        manifest = read_manifest(self._out)
        size = sum(path.stat().st_size for path in self._out.rglob("*") if path.is_file())
        head = sum(p.stat().st_size for p in (self._out / "base").rglob("*") if p.is_file())
        tokens = sum(self.tokens.values())
        return ExtractSummary(
            out=str(self._out),
            base=base,
            documents={name: split.documents for name, split in manifest.splits.items()},
            sequences={name: split.sequences for name, split in manifest.splits.items()},
            tokens=self.tokens,
            bytes=size,
            bytes_per_token=round((size - head) / tokens, 1),
            predicted_bytes=predicted,
            blocks=sum(split.blocks for split in manifest.splits.values()),
            resumed_blocks=self._resumed,
            quarantined=sum(len(split.quarantined) for split in manifest.splits.values()),
            self_check=manifest.extracted["self_check"],
            seconds=manifest.extracted["seconds"],
            tokens_per_second=manifest.extracted["tokens_per_second"],
            corpus=self._corpus_summary,
        )
