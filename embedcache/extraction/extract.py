"""Stage one: run a frozen base once over a corpus and write its embeddings to a cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcache.cache.blocks.commit import newest_generations
from embedcache.cache.format.layout import MANIFEST, SPLITS, ExtractSettings, summary_of
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.extraction.block_queue import CommittedBlocks
from embedcache.extraction.estimate import Estimate, RoomError, estimate
from embedcache.extraction.plan import check_out, is_planned, plan, remove_tokens
from embedcache.extraction.prepare import prepare
from embedcache.extraction.request import Corpus, Request
from embedcache.extraction.run import Extraction, ExtractSummary, summarise
from embedcache.progress import SILENT, Progress
from embedcache.store.files import translate_write_errors
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import finish_transaction

__all__ = ["ExtractSummary", "estimate_extraction", "extract"]


def extract(
    corpus: Corpus | None,
    *,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: ExtractSettings | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_quarantined: float = 0.01,
    progress: Progress = SILENT,
    **keywords: Any,
) -> ExtractSummary:
    """Extract a corpus into the cache at ``out``, or continue one that was interrupted.

    Any number of processes may run the same call at once, on one machine or on several that share
    a file system. One tokenises the corpus, then all of them share the blocks. The blocks of a
    process that died are taken over by the others.

    Args:
        corpus: a `CorpusConfig`, or its sources: one or several files, folders, globs,
            ``hf:org/name`` or ``stdlib:``. None continues the cache at ``out``.
        base: a hub id, a local directory, a GGUF file or ``builtin:NAME``.
        out: an absent or empty folder, or a cache that was begun by the same call.
        settings: taps, codec, and sizes of blocks and batches.
        revision: the hub revision of the base.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the dtype of the cache at
            ``out``; for a new one bfloat16 if the device computes it fast, else float32.
        max_quarantined: permitted share of sequences whose embeddings are not finite.
        progress: shows every stage.
        **keywords: fields of `CorpusConfig` and `ExtractSettings`, in place of these objects.

    Returns:
        Counts, sizes and speed. A finished cache is left unchanged.

    Raises:
        UsageError: for unknown or contradictory arguments.
        OutputError: if ``out`` holds something else, another cache, or has too little room.
        BaseModelError: if the base cannot be used.
        CorpusError: if the corpus cannot be read.
        NumericsError: if too many embeddings are not finite, or batches change the results.
        CacheError: if the cache is damaged.

    Example:
        >>> from embedcache import extract
        >>> extract("docs/", base="builtin:smollm2-135m", out="cache", codec="transform",
        ...         bits=1.5, context=512, dev_fraction=0.1)  # doctest: +SKIP
    """
    request = Request.of(
        corpus,
        settings,
        keywords,
        base=base,
        out=out,
        revision=revision,
        device=device,
        dtype=dtype,
        max_quarantined=max_quarantined,
        progress=progress,
    )
    folder = request.out
    check_out(folder)
    identity = request.identity()
    created = not folder.exists()
    leases = Leases(folder)
    try:
        with translate_write_errors(folder), leases, ExitStack() as turn:
            turn.enter_context(leases.coordinating(progress))
            finish_transaction(folder)
            begun = is_planned(folder)
            attributes = plan(request, identity, folder, leases)
            run = Extraction(request, attributes, leases)
            try:
                counts = run.finish(turn)
            except RoomError:
                if not begun and leases.holds(COORDINATOR):
                    remove_tokens(folder)
                raise
    except BaseException:
        if created and not is_planned(folder):
            with suppress(OSError):  # not empty: another process has begun there
                folder.rmdir()
        raise
    return summarise(folder, attributes, counts)


def estimate_extraction(
    corpus: Corpus | None,
    *,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: ExtractSettings | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
    **keywords: Any,
) -> tuple[Estimate, dict[str, Any]]:
    """Estimate the size and duration of `extract` without writing to ``out``.

    The corpus is tokenised into the system's temporary folder (about 4 bytes a token), and a few
    batches are computed. If ``out`` was begun by the same call, only the rest is estimated.

    Args:
        corpus: as for `extract`.
        base: as for `extract`.
        out: as for `extract`.
        settings: as for `extract`.
        revision: as for `extract`.
        device: as for `extract`.
        dtype: as for `extract`.
        progress: shows every stage.
        **keywords: as for `extract`.

    Returns:
        The estimate, and the counts of the corpus.
    """
    request = Request.of(
        corpus,
        settings,
        keywords,
        base=base,
        out=out,
        revision=revision,
        device=device,
        dtype=dtype,
        max_quarantined=1.0,
        progress=progress,
    )
    check_out(request.out)
    identity = request.identity()
    with _planned_folder(request.out) as folder:
        attributes = plan(request, identity, folder)
        splits = {
            name: SplitTokens(folder, name, attributes.settings.block_tokens) for name in SPLITS
        }
        committed = CommittedBlocks(splits, "", 1.0)
        for name in SPLITS:
            committed.blocks[name] = set(newest_generations(folder, name))
        blocks = committed.missing()
        if blocks and not (folder / MANIFEST).is_file():
            fresh = not committed.blocks["train"]
            found = prepare(
                request, attributes, folder, splits, blocks, fresh=fresh, scratch=None
            ).estimate
        else:
            found = estimate(folder, splits, blocks, device=request.device, out=request.out)
        if folder != request.out:
            found = replace(found, bytes_to_go=found.bytes)
        return found, summary_of(attributes.corpus)


@contextmanager
def _planned_folder(out: Path) -> Iterator[Path]:
    """Yield ``out`` if its tokens are complete, else a temporary folder."""
    if is_planned(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="embedcache-") as scratch:
        yield Path(scratch)
