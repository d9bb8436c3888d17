"""One run of stage one over the blocks that have no marker yet."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.base.forward import BlockForward
from embedcache.base.load import Base
from embedcache.cache.base_arrays import Cost
from embedcache.cache.blocks.commit import (
    Marker,
    clear_staging,
    drop_superseded,
    newest_generations,
    recover,
)
from embedcache.cache.blocks.files import block_digest_tables
from embedcache.cache.format.layout import CODEC, MANIFEST, SPLITS, ExtractSettings
from embedcache.cache.manifest.digests import Digests, read_digests
from embedcache.cache.manifest.manifest import (
    Manifest,
    publish_manifest,
    read_manifest,
    split_manifest,
)
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import used_bytes
from embedcache.editing.repair import Mended
from embedcache.errors import OutputError
from embedcache.extraction.calibrate_cache import (
    Calibrations,
    calibration_cost,
    calibrations_of,
    codecs_by_split,
    store_calibrations,
)
from embedcache.extraction.committed import Committed, recorded
from embedcache.extraction.encode import BlockEncoder
from embedcache.extraction.measure import Measured, measure
from embedcache.extraction.pipeline import Pipeline
from embedcache.extraction.prediction import require_room
from embedcache.extraction.preflight import blocks_to_go, predict
from embedcache.extraction.quarantine import Quarantine
from embedcache.extraction.sample import Known
from embedcache.extraction.store_base import base_cost, store_base
from embedcache.progress import Progress
from embedcache.store.files import STAGING, fsync_path, make_folder
from embedcache.store.lease import COORDINATOR, Leases


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What an extraction did. Speeds count this run's blocks only; bytes are of the whole cache.

    Of ``blocks``, ``resumed_blocks`` were there when it began, ``computed_blocks`` it made itself,
    and ``others_blocks`` were made meanwhile by other processes.
    """

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
    computed_blocks: int
    others_blocks: int
    quarantined: int
    self_check: float
    seconds: float
    tokens_per_second: float
    corpus: dict[str, Any]


class Extraction:
    """One run over the blocks that have no marker yet."""

    def __init__(
        self,
        out: Path,
        leases: Leases,
        corpus_summary: dict[str, Any],
        settings: ExtractSettings,
        max_quarantined: float,
        progress: Progress,
    ):
        self._out = out
        self._leases = leases
        self._corpus_summary = corpus_summary
        self._settings = settings
        self._progress = progress
        self._splits = {name: SplitTokens(out, name, settings.block_tokens) for name in SPLITS}
        self.tokens = {name: split.totals["tokens"] for name, split in self._splits.items()}
        self._max_quarantined = max_quarantined
        self._resumed = self._computed = self._others = 0

    def compute(
        self, load: Callable[[], Base], turn: ExitStack, mended: Mended | None = None
    ) -> None:
        """Have every block without a sound marker computed, and the manifest published.

        ``turn`` holds this process's turn to do what one does for all; it is given up in between,
        but for a repair, which is alone.
        """
        out, progress = self._out, self._progress
        live = self._live()
        self._leases.require(COORDINATOR)
        # Before recovery: a marker that is withdrawn is made again in its place, one of a damaged
        # block is followed, and any that comes from now on is another process's.
        newest = {name: newest_generations(out, name) for name in self._splits}
        there = self._count(self._recover(live) if mended is None else mended.sound())
        clear_staging(out, live)
        make_folder(self._leases.staging)
        self._resumed = there.blocks
        there.quarantine.check()
        todo = blocks_to_go(self._splits, there.done)
        generations = {
            name: {b: at + (mended is not None) for b, at in found.items() if b not in done}
            for (name, found), done in zip(newest.items(), there.done.values(), strict=True)
        }
        if self._resumed:
            progress.say(f"resuming: {self._resumed} blocks are there, {len(todo)} to go")
        worst, tokens, seconds = 0.0, 0, 0.0
        calibrations: Calibrations = {}
        known: Known = {}
        base, measured, stored, spent = None, Measured(), Cost(), 0.0
        again = mended is not None and mended.base
        damaged_codec = None if mended is None else mended.codec
        prepared = mended is None and self._prepared()
        if prepared:
            turn.close()
        if todo or again or damaged_codec or not (out / "base").is_dir():
            with progress.bar("loading the base", None, "") as _:
                base = load()
            started = time.perf_counter()
            forward = BlockForward(
                base,
                self._settings.taps,
                block_tokens=self._settings.block_tokens,
                batch_tokens=self._settings.batch_tokens,
            )
            with progress.bar("calibrating the codec", None, "") as _:
                calibrations, known = calibrations_of(
                    out,
                    self._splits["train"],
                    forward,
                    base,
                    self._settings,
                    fresh=not there.done["train"],
                    again=damaged_codec is not None,
                )
            codecs = codecs_by_split(self._settings, calibrations, base)
            scratch = self._leases.staging
            measured = measure(
                base, forward, self._splits, todo, self._settings, codecs, progress, scratch
            )
            for item, batches in measured.known.items():
                known.setdefault(item, {}).update(batches)
            stored = base_cost(out, base, scratch) + calibration_cost(out, calibrations, scratch)
            spent = time.perf_counter() - started
        predicted = predict(
            out,
            self._splits,
            todo,
            measured,
            base=base,
            stored=stored,
            known=known,
            spent=spent,
        )
        if base is not None:
            progress.say(str(predicted))
            require_room(predicted, out)
            if not prepared:
                self._leases.require(COORDINATOR)
            store_base(out, base, self._leases.staging, again=again)
            store_calibrations(out, calibrations, self._leases.staging, expected=damaged_codec)
            if mended is None:
                turn.close()
            encoders = {
                name: BlockEncoder(name, self._settings, codecs[name], base.head)
                for name in dict(todo)
            }
            pipeline = Pipeline(
                out, self._leases, self._splits, base, forward, encoders, there.quarantine, progress
            )
            worst, tokens = pipeline.run(todo, known, generations)
            seconds = time.perf_counter() - started
        if mended is None:
            turn.close()
            turn.enter_context(self._leases.coordinating(progress))
        live = self._live()
        made = self._count(self._recover(live))
        if left := blocks_to_go(self._splits, made.done):
            raise OutputError(
                f"{len(left)} blocks of {out} were committed and their files are gone: type the "
                "same again to compute them anew"
            )
        self._computed = made.own
        self._others = made.blocks - self._resumed - self._computed
        made.quarantine.check(finished=True)
        extracted = (mended and mended.extracted) or {
            "self_check": worst,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "predicted_bytes": predicted.bytes,
            "predicted_seconds": predicted.seconds,
        }
        if mended is not None or not (out / MANIFEST).is_file():
            self._leases.require(COORDINATOR)
            self._publish(extracted)
        for name in self._splits:
            drop_superseded(out, name)
        if self._leases.holds(COORDINATOR):
            clear_staging(out, live)

    def tidy(self) -> None:
        """Remove what one left that died just after it had published the manifest, and no more.

        What else is staged beside a finished cache is an append's or a repair's, that may go on.
        """
        live, staging = self._live(), self._out / STAGING
        for folder in [folder for folder in staging.glob("*") if folder.name not in live]:
            shutil.rmtree(folder / "manifest", ignore_errors=True)
            with suppress(OSError):  # not empty
                folder.rmdir()
        with suppress(OSError):
            staging.rmdir()

    def _manifest(self, made: Path, extracted: dict[str, Any]) -> Manifest:
        """Return the manifest of the finished cache; its digest tables are written in ``made``."""
        out, settings = self._out, self._settings
        return Manifest(
            splits={
                name: split_manifest(
                    made, name, settings, split.totals, recorded(out, name, split.blocks)
                )
                for name, split in self._splits.items()
            },
            tokens=read_digests(out),
            base=Digests.of(out, out / "base"),
            codec=Digests.of(out, out / CODEC),
            extracted=extracted,
        )

    def _publish(self, extracted: dict[str, Any]) -> None:
        """Publish digest tables and manifest from staging, gone if this process was taken for dead.

        What others did to the cache meanwhile stands.
        """
        out, made = self._out, self._leases.staging / "manifest"
        try:
            manifest = self._manifest(made, extracted)
            publish_manifest(made, manifest)
            for split, counts in manifest.splits.items():
                seals = (counts.embeddings, counts.quarantined)
                for name, seal in zip(block_digest_tables(split), seals, strict=True):
                    self._leases.require(COORDINATOR)
                    make_folder((out / name).parent)
                    if seal.rows:
                        (made / name).replace(out / name)
                    else:
                        (out / name).unlink(missing_ok=True)
                    fsync_path((out / name).parent)
            self._leases.require(COORDINATOR)
            (made / MANIFEST).replace(out / MANIFEST)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        fsync_path(out)

    def _prepared(self) -> bool:
        """Whether what one process stores for all is there."""
        coded = self._settings.codec != "transform" or not self._splits["train"].blocks
        return (self._out / "base").is_dir() and (coded or (self._out / CODEC).is_dir())

    def _live(self) -> set[str]:
        """Return the attempts of the other processes that are alive."""
        return {holder.attempt for holder in self._leases.others()}

    def _recover(self, live: set[str]) -> Iterator[Marker]:
        for name, split in self._splits.items():
            yield from recover(self._out, name, split.blocks, live)

    def _count(self, markers: Iterable[Marker]) -> Committed:
        quarantine = Quarantine(self._splits, self._max_quarantined)
        return Committed(quarantine, self._leases.attempt).count(markers)

    def summary(self, base: str) -> ExtractSummary:
        """Return the counts and sizes of the finished cache."""
        manifest = read_manifest(self._out)
        size = used_bytes(self._out)
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
            computed_blocks=self._computed,
            others_blocks=self._others,
            quarantined=sum(split.quarantined.rows for split in manifest.splits.values()),
            self_check=manifest.extracted["self_check"],
            seconds=manifest.extracted["seconds"],
            tokens_per_second=manifest.extracted["tokens_per_second"],
            corpus=self._corpus_summary,
        )
