"""Stage one: run a frozen base once over a corpus and write its embeddings to a cache."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from embedcache.base.load import load_base, load_identity, load_tokenizer
from embedcache.base.taps import check_taps
from embedcache.cache.format.layout import MANIFEST, ExtractSettings, summary_of
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device
from embedcache.editing.repair import mend, restore_metadata
from embedcache.errors import UsageError
from embedcache.extraction.plan import (
    check_out,
    environment_for,
    own_corpus,
    remove_tokens,
    sealed_attributes,
    write_tokens,
)
from embedcache.extraction.prediction import RoomError
from embedcache.extraction.run import Extraction, ExtractSummary
from embedcache.progress import SILENT, Progress
from embedcache.store.files import translate_write_errors
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import finish_transaction

__all__ = ["ExtractSummary", "extract"]


def extract(
    corpus: CorpusConfig | None,
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

    Any number of processes may do so at once, on one machine or on several that share a file
    system: one runs pass 0, then all share out the blocks, and take over those of one that died.

    Args:
        corpus: what to read, how to render and split it. None, for a repair alone, is what ``out``
            was made of; a merged cache, which is of several, is repaired by that.
        base: a hub id, a local directory, a GGUF file or ``builtin:NAME``.
        out: an absent or empty folder, or a cache begun with the same request.
        settings: taps, codec, and sizes of blocks and batches; without a corpus those of ``out``.
        revision: the hub revision of the base.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto`` (what ``out`` was begun in; else bfloat16 on CUDA, and on CPUs with units
            for it, float32 on others), or a name.
        max_quarantined: share of sequences that may be put aside for values that are not finite.
        repair: verify what is at ``out`` first, all of it, and make what is damaged anew.
        progress: told of every stage.

    Returns:
        The counts, sizes and speed. A cache that is already complete is left as it is.

    Raises:
        EmbedcacheError: for anything a user can mend; see the modules concerned.
    """
    if corpus is not None:
        settings = settings or ExtractSettings(context=corpus.context)
    elif not repair:
        raise UsageError("expected a corpus to extract, found none: only a repair needs none")
    if not repair:
        check_out(out)
    identity = load_identity(base, revision=revision)
    if settings is not None:
        check_taps(settings.taps, identity.num_layers)
    target = resolve_device(device)
    created = not out.exists()
    leases = Leases(out)
    try:
        with translate_write_errors(out), leases, ExitStack() as turn:
            if repair:
                leases.require_alone("--repair")
            turn.enter_context(leases.coordinating(progress))
            finish_transaction(out)
            if repair:
                leases.require_alone("--repair")  # one may have come to wait just now
                restore_metadata(out)
            environment = environment_for(out, target, dtype)
            attributes = sealed_attributes(out, corpus, identity, settings, environment)
            begun = attributes is not None
            if attributes is None:
                assert corpus is not None and settings is not None  # a repair has begun
                tokenizer = load_tokenizer(base, revision=revision)
                attributes = write_tokens(
                    corpus,
                    tokenizer,
                    identity,
                    settings,
                    environment,
                    out,
                    progress,
                    staging=leases.staging,
                    holds=lambda: leases.holds(COORDINATOR),
                )
            settings, summary = attributes.settings, summary_of(attributes.corpus)
            mended = None
            if repair:
                mended = mend(
                    out,
                    corpus or own_corpus(attributes),
                    lambda: load_tokenizer(base, revision=revision),
                    settings,
                    progress,
                )
            run = Extraction(out, leases, summary, settings, max_quarantined, progress)
            if mended is not None or not (out / MANIFEST).is_file():
                try:
                    run.compute(
                        lambda: load_base(
                            base, revision=revision, device=device, dtype=environment["dtype"]
                        ),
                        turn,
                        mended,
                    )
                except RoomError:
                    if not begun and leases.holds(COORDINATOR):
                        remove_tokens(out)
                    raise
            else:
                run.tidy()
    except BaseException:
        if created and not (out / "zarr.json").is_file():
            with suppress(OSError):  # another process may have begun there
                out.rmdir()
        raise
    return run.summary(identity.name)
