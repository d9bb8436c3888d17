"""One run of stage one: prepare, compute the blocks that are not committed, publish."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.commit import clear_staging, drop_superseded, recover
from embedcache.cache.format.layout import CODEC, MANIFEST, SPLITS, CacheAttributes, summary_of
from embedcache.cache.manifest.manifest import read_manifest
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.usage import used_bytes
from embedcache.errors import OutputError
from embedcache.extraction.block_queue import CommittedBlocks
from embedcache.extraction.encode import BlockEncoder
from embedcache.extraction.estimate import estimate
from embedcache.extraction.pipeline import Pipeline
from embedcache.extraction.prepare import Prepared, prepare, store
from embedcache.extraction.publish import clear_unpublished, publish
from embedcache.extraction.request import Request
from embedcache.extraction.sample import BlockId
from embedcache.store.files import make_folder
from embedcache.store.lease import COORDINATOR, Leases


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What an extraction did."""

    out: str
    base: str
    documents: dict[str, int]
    """Documents by split."""
    sequences: dict[str, int]
    """Sequences by split."""
    tokens: dict[str, int]
    """Tokens by split."""
    bytes: int
    """Bytes of all files of the cache."""
    bytes_per_token: float
    """Bytes a token, without the arrays of the base."""
    estimated_bytes: int
    estimated_seconds: float
    blocks: int
    resumed_blocks: int
    """Blocks that were committed before this run."""
    computed_blocks: int
    """Blocks that this run computed."""
    others_blocks: int
    """Blocks that other processes computed during this run."""
    quarantined: int
    """Sequences whose embeddings are not finite."""
    self_check: float
    """Largest relative difference between batched and unbatched embeddings."""
    seconds: float
    """Seconds from the moment the base was loaded."""
    tokens_per_second: float
    """Tokens that the run computed, a second."""
    corpus: dict[str, Any]
    """Counts of the corpus."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Numbers of blocks by origin."""

    resumed: int = 0
    computed: int = 0
    others: int = 0


class Extraction:
    """One run over a planned cache."""

    def __init__(self, request: Request, attributes: CacheAttributes, leases: Leases):
        self._request = request
        self._attributes = attributes
        self._settings = attributes.settings
        self._leases = leases
        self._out = request.out
        self._splits = {
            name: SplitTokens(self._out, name, self._settings.block_tokens) for name in SPLITS
        }

    def finish(self, turn: ExitStack) -> BlockCounts:
        """Have every block committed and the manifest published.

        Args:
            turn: holds the coordinator's lease. It is closed while blocks are computed, so that
                other processes can join.
        """
        out, leases, progress = self._out, self._leases, self._request.progress
        if (out / MANIFEST).is_file():
            clear_unpublished(out, leases)
            return BlockCounts(resumed=sum(split.blocks for split in self._splits.values()))
        live = self._live()
        there = self._committed(live)
        clear_staging(out, live)
        make_folder(leases.staging)
        there.check_quarantined()
        resumed, blocks = len(there), there.missing()
        if resumed:
            progress.say(f"resuming: {resumed} blocks are there, {len(blocks)} to go")
        ready = self._is_prepared()
        if ready:
            turn.close()
        prepared = None
        if blocks or not (out / "base").is_dir():
            prepared = prepare(
                self._request,
                self._attributes,
                out,
                self._splits,
                blocks,
                fresh=not there.blocks["train"],
                scratch=leases.staging,
            )
            progress.say(str(prepared.estimate))
            prepared.estimate.require_room(out)
            if not ready:
                leases.require(COORDINATOR)
            store(prepared, out, leases.staging)
        turn.close()
        extracted = self._compute(prepared, blocks, there)
        turn.enter_context(leases.coordinating(progress))
        live = self._live()
        done = self._committed(live)
        if left := done.missing():
            raise OutputError(
                f"{len(left)} blocks of {out} were committed and their files are missing: run the "
                "same call again to compute them anew"
            )
        done.check_quarantined(finished=True)
        if not (out / MANIFEST).is_file():
            leases.require(COORDINATOR)
            publish(out, self._splits, self._settings, extracted, leases)
        if leases.holds(COORDINATOR):
            clear_staging(out, live)
        return BlockCounts(resumed, done.own, len(done) - resumed - done.own)

    def _committed(self, live: set[str]) -> CommittedBlocks:
        """Finish commits of processes that died and count the committed blocks.

        Args:
            live: attempts of the other processes that are alive.
        """
        self._leases.require(COORDINATOR)
        found = CommittedBlocks(self._splits, self._leases.attempt, self._request.max_quarantined)
        for name, split in self._splits.items():
            drop_superseded(self._out, name)
            found.add_all(recover(self._out, name, split.blocks, live))
        return found

    def _live(self) -> set[str]:
        """Return the attempts of the other processes that are alive."""
        return {writer.attempt for writer in self._leases.others()}

    def _is_prepared(self) -> bool:
        """Return whether the arrays of the base and the calibration are stored."""
        calibrated = self._settings.codec != "transform" or not self._splits["train"].blocks
        return (self._out / "base").is_dir() and (calibrated or (self._out / CODEC).is_dir())

    def _compute(
        self, prepared: Prepared | None, blocks: list[BlockId], committed: CommittedBlocks
    ) -> dict[str, Any]:
        """Compute blocks and return what the manifest says of the run."""
        worst, tokens, seconds = 0.0, 0, 0.0
        if prepared is None:
            estimated = estimate(
                self._out, self._splits, blocks, device=self._request.device, out=self._out
            )
        else:
            estimated = prepared.estimate
            encoders = {
                name: BlockEncoder(name, self._settings, prepared.codecs[name], prepared.base.head)
                for name in dict(blocks)
            }
            pipeline = Pipeline(
                self._out,
                self._leases,
                self._splits,
                prepared.base,
                prepared.forward,
                encoders,
                committed,
                self._request.progress,
            )
            worst, tokens = pipeline.run(blocks, prepared.computed)
            seconds = time.perf_counter() - prepared.started
        return {
            "self_check": worst,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "estimated_bytes": estimated.bytes,
            "estimated_seconds": estimated.seconds,
        }


def summarise(out: Path, attributes: CacheAttributes, counts: BlockCounts) -> ExtractSummary:
    """Return the summary of a finished cache."""
    manifest = read_manifest(out)
    size = used_bytes(out)
    head = sum(path.stat().st_size for path in (out / "base").rglob("*") if path.is_file())
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    return ExtractSummary(
        out=str(out),
        base=attributes.base["name"],
        documents={name: split.documents for name, split in manifest.splits.items()},
        sequences={name: split.sequences for name, split in manifest.splits.items()},
        tokens=tokens,
        bytes=size,
        bytes_per_token=round((size - head) / sum(tokens.values()), 1),
        estimated_bytes=manifest.extracted["estimated_bytes"],
        estimated_seconds=manifest.extracted["estimated_seconds"],
        blocks=sum(split.blocks for split in manifest.splits.values()),
        resumed_blocks=counts.resumed,
        computed_blocks=counts.computed,
        others_blocks=counts.others,
        quarantined=sum(split.quarantined.rows for split in manifest.splits.values()),
        self_check=manifest.extracted["self_check"],
        seconds=manifest.extracted["seconds"],
        tokens_per_second=manifest.extracted["tokens_per_second"],
        corpus=summary_of(attributes.corpus),
    )
