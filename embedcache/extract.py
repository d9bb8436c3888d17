"""Stage one: run a frozen base once over a corpus and write its embeddings to a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.base.load import Base, load_base, load_identity, load_tokenizer
from embedcache.base.taps import check_taps
from embedcache.cache.commit import (
    clear_staging,
    drop_superseded,
    recover,
)
from embedcache.cache.layout import CODEC, MANIFEST, SPLITS, ExtractSettings
from embedcache.cache.manifest import (
    Manifest,
    publish_manifest,
    read_manifest,
    split_manifest,
)
from embedcache.cache.rewrite import finish_rewrite
from embedcache.cache.sealed import Seal, read_seal
from embedcache.cache.tokens import SplitTokens
from embedcache.cache.transform import codecs_of
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device, resolve_dtype
from embedcache.extraction.calibrate_cache import (
    Calibrations,
    calibration_bytes,
    calibrations_of,
    embedding_of,
    store_calibrations,
)
from embedcache.extraction.encoder import BlockEncoder
from embedcache.extraction.forward import BlockForward
from embedcache.extraction.measure import Measured, measure
from embedcache.extraction.pipeline import Pipeline
from embedcache.extraction.plan import (
    check_out,
    environment_of,
    seal_corpus,
    sealed_attributes,
    unseal,
)
from embedcache.extraction.prediction import RoomError, require_room
from embedcache.extraction.preflight import blocks_to_go, predict
from embedcache.extraction.quarantine import Quarantine
from embedcache.extraction.repair import Mended, mend, restore_metadata
from embedcache.extraction.store_base import store_base
from embedcache.files import LOCK, writer_lock
from embedcache.progress import SILENT, Progress


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
    predicted_seconds: float
    blocks: int
    resumed_blocks: int
    quarantined: int
    self_check: float
    seconds: float
    tokens_per_second: float
    corpus: dict[str, Any]


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
            finish_rewrite(out)
            if repair:
                restore_metadata(out)
            attributes = sealed_attributes(out, corpus, identity, settings, environment)
            begun = attributes is not None
            if attributes is None:
                tokenizer = load_tokenizer(base, revision=revision)
                attributes = seal_corpus(
                    corpus, tokenizer, identity, settings, environment, out, progress
                )
            summary = attributes.corpus["summary"]
            mended = None
            if repair:
                mended = mend(
                    out, corpus, lambda: load_tokenizer(base, revision=revision), settings, progress
                )
            run = _Extraction(out, summary, settings, target, max_quarantined, progress)
            if mended is not None or not (out / MANIFEST).is_file():
                try:
                    run.compute(
                        lambda: load_base(base, revision=revision, device=device, dtype=dtype),
                        mended,
                    )
                except RoomError:
                    if not begun:
                        unseal(out)
                    raise
        except BaseException:
            if not (out / "zarr.json").is_file():
                (out / LOCK).unlink(missing_ok=True)
                if created:
                    with suppress(OSError):  # another process may have begun there
                        out.rmdir()
            raise
        return run.summary(identity.name)


class _Extraction:
    """One run over the blocks that have no marker yet."""

    def __init__(
        self,
        out: Path,
        corpus_summary: dict[str, Any],
        settings: ExtractSettings,
        device: torch.device,
        max_quarantined: float,
        progress: Progress,
    ):
        self._out = out
        self._device = device
        self._corpus_summary = corpus_summary
        self._settings = settings
        self._progress = progress
        self._splits = {name: SplitTokens(out, name, settings.block_tokens) for name in SPLITS}
        self.tokens = {name: split.totals["tokens"] for name, split in self._splits.items()}
        self._quarantine = Quarantine(self._splits, max_quarantined)
        self._resumed = 0

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
                self._quarantine.count(name, marker)
        self._quarantine.check()
        todo = blocks_to_go(self._splits, {name: set(done) for name, done in markers.items()})
        if self._resumed:
            progress.say(f"resuming: {self._resumed} blocks are there, {len(todo)} to go")
        worst, tokens, seconds = 0.0, 0, 0.0
        calibrations: Calibrations = {}
        base, measured = None, Measured()
        again = mended is not None and mended.base
        damaged_codec = None if mended is None else mended.codec
        if todo or again or damaged_codec or not (out / "base").is_dir():
            with progress.bar("loading the base", None, "") as _:
                base = load()
            forward = BlockForward(
                base,
                self._settings.taps,
                block_tokens=self._settings.block_tokens,
                batch_tokens=self._settings.batch_tokens,
            )
            started = time.perf_counter()
            with progress.bar("calibrating the codec", None, "") as _:
                calibrations, computed = calibrations_of(
                    out,
                    self._splits["train"],
                    forward,
                    base,
                    self._settings,
                    fresh=not markers["train"],
                    again=damaged_codec is not None,
                )
            calibrating = time.perf_counter() - started
            embedding_VH = embedding_of(base)
            codecs = {
                name: codecs_of(name, self._settings, calibrations, embedding_VH) for name in SPLITS
            }
            measured = measure(base, forward, self._splits, todo, self._settings, codecs, progress)
        predicted = predict(
            out,
            self._splits,
            todo,
            measured,
            base=base,
            device=self._device,
            codec_bytes=calibration_bytes(out, calibrations),
        )
        if base is not None:
            progress.say(str(predicted))
            require_room(predicted, out)
            store_base(out, base, again=again)
            store_calibrations(out, calibrations, expected=damaged_codec)
            encoders = {
                name: BlockEncoder(name, self._settings, codecs[name]) for name in dict(todo)
            }
            pipeline = Pipeline(
                out, self._splits, base, forward, encoders, self._quarantine, progress
            )
            worst, tokens, seconds = pipeline.run(todo, markers, measured.known, computed)
            seconds += calibrating + measured.seconds
        self._quarantine.check(finished=True)
        manifest = Manifest(
            splits={
                name: split_manifest(split.totals, markers[name], split.blocks)
                for name, split in self._splits.items()
            },
            sealed=read_seal(out),
            base=Seal.of(out, out / "base"),
            codec=Seal.of(out, out / CODEC),
            extracted=(mended and mended.extracted)
            or {
                "self_check": worst,
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
                "predicted_bytes": predicted.bytes,
                "predicted_seconds": predicted.seconds,
            },
        )
        publish_manifest(out, manifest)
        for name in self._splits:
            drop_superseded(out, name)
        clear_staging(out)

    def summary(self, base: str) -> ExtractSummary:
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
            predicted_bytes=manifest.extracted["predicted_bytes"],
            predicted_seconds=manifest.extracted["predicted_seconds"],
            blocks=sum(split.blocks for split in manifest.splits.values()),
            resumed_blocks=self._resumed,
            quarantined=sum(len(split.quarantined) for split in manifest.splits.values()),
            self_check=manifest.extracted["self_check"],
            seconds=manifest.extracted["seconds"],
            tokens_per_second=manifest.extracted["tokens_per_second"],
            corpus=self._corpus_summary,
        )
