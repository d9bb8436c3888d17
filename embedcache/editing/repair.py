"""Repairing a cache: put back what can be put back, then extract what is lost.

Nothing sound is removed, except that the manifest goes last, so that readers refuse the cache until
`extract` has published a new one. A repair may be stopped at any step: the next one finds what is
left to do as it found the damage, by `verify`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.base.forward import BlockForward
from embedcache.cache.blocks.commit import (
    BlockWriter,
    Marker,
    clear_staging,
    committed_blocks,
    drop_superseded,
    newest_generations,
    promote,
)
from embedcache.cache.format.layout import (
    COMMITS,
    MANIFEST,
    SPLITS,
    TOKENS_DIGESTS,
    CacheAttributes,
    ExtractSettings,
    block_shards,
)
from embedcache.cache.manifest.digests import (
    METADATA,
    Digests,
    metadata_fault,
    publish_digests,
    read_digests,
)
from embedcache.cache.manifest.file_record import FileRecord, content_fault
from embedcache.cache.manifest.manifest import Manifest, read_manifest
from embedcache.cache.tokens.files import TokenFiles, tokens_digest_table, write_tokens_digest_table
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.writer import TokensWriter
from embedcache.cache.verify import Verification, verify_idle
from embedcache.errors import CacheError
from embedcache.extraction.calibrate_cache import new_calibrations, store_calibrations
from embedcache.extraction.extract import ExtractSummary, extract
from embedcache.extraction.plan import corpus_of, environment_for, planned, tokenise
from embedcache.extraction.publish import amend_manifest
from embedcache.extraction.request import Corpus, Request
from embedcache.extraction.sample import ComputedBatches
from embedcache.progress import SILENT, Progress
from embedcache.store.files import (
    STAGING,
    fsync_path,
    make_folder,
    publish_bytes,
    translate_write_errors,
)
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import finish_transaction

WHAT = "repair"


def repair(
    cache: str | os.PathLike[str],
    corpus: Corpus | None = None,
    *,
    base: str | os.PathLike[str],
    settings: ExtractSettings | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_quarantined: float = 0.01,
    progress: Progress = SILENT,
    **keywords: Any,
) -> ExtractSummary:
    """Verify every byte of a cache, restore what is damaged, and extract damaged blocks again.

    Metadata, digest tables and markers are restored from each other, tokens from the corpus, the
    calibration and the arrays of the base from the base. A sound cache is left unchanged. No other
    process may write the cache. Readers refuse it from the moment that damaged blocks are dropped
    until they are computed again.

    Args:
        cache: the folder of the cache, finished or not.
        corpus: the corpus that the cache was made of. The default is the one it names.
        base: the base that the cache was made of.
        settings: the settings that the cache was made with. The default is the cache's own.
        revision: the hub revision of the base.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, or the dtype of the cache.
        max_quarantined: permitted share of sequences whose embeddings are not finite.
        progress: shows every stage.
        **keywords: as for `extract`.

    Returns:
        The summary of the finished cache.

    Raises:
        CacheError: if the cache cannot be repaired. Damaged tokens need the corpus as it was, a
            damaged calibration must come out as it was. Nothing that was sound is changed then.
        OutputError: if other processes write the cache, or it was made by another request.
        IdentityError: for another base.
    """
    request = Request.of(
        corpus,
        settings,
        keywords,
        base=base,
        out=cache,
        revision=revision,
        device=device,
        dtype=dtype,
        max_quarantined=max_quarantined,
        progress=progress,
    )
    out = request.out
    if not any((out / name).is_file() for name in (METADATA, MANIFEST, TOKENS_DIGESTS)):
        raise CacheError(f"{out} holds no cache to repair: extract into it first")
    identity = request.identity()
    leases = Leases(out)
    with translate_write_errors(out), leases:
        leases.require_alone(WHAT)
        with leases.coordinating(progress):
            finish_transaction(out)
            leases.require_alone(WHAT)  # another may have come to wait
            _restore_metadata(out)
            attributes = planned(request, identity, environment_for(out, request.device, dtype))
            assert attributes is not None
            extracted = _Repair(request, attributes, leases).run()
    summary = extract(
        corpus,
        base=base,
        out=cache,
        settings=settings,
        revision=revision,
        device=device,
        dtype=dtype,
        max_quarantined=max_quarantined,
        progress=progress,
        **keywords,
    )
    if extracted is not None:
        _keep_extracted(out, extracted, progress)
    return summary


def _keep_extracted(out: Path, extracted: dict[str, Any], progress: Progress) -> None:
    """Have the manifest say of the first run and of appends what it said before the repair."""
    leases = Leases(out)
    with translate_write_errors(out), leases, leases.coordinating(progress):
        if (out / MANIFEST).is_file():
            amend_manifest(out, extracted, leases)


def _restore_metadata(out: Path) -> None:
    """Restore every ``zarr.json`` of pass 0, so that the cache can be opened.

    Raises ``CacheError`` if no file states what the cache holds.
    """
    for name, text in _digests(out)[1].metadata.items():
        for partial in (out / name).parent.glob(f".{METADATA}.*.partial"):
            partial.unlink()  # of a repair that was stopped as it published one
        if metadata_fault(out / name, text) is not None:
            publish_bytes(out / name, text.encode())


def _digests(out: Path) -> tuple[Manifest | None, Digests]:
    """Return the manifest if it is sound, and the digests of pass 0, from it or ``tokens.json``."""
    try:
        manifest = read_manifest(out)
    except (CacheError, OSError):
        manifest = None
    if manifest is not None:
        return manifest, manifest.tokens
    try:
        return None, read_digests(out)
    except CacheError as error:
        raise CacheError(
            f"{out} cannot be repaired: nothing states what its tokens were, because neither "
            f"{MANIFEST} nor {TOKENS_DIGESTS} is whole. Restore one of them, or extract into a "
            "new folder"
        ) from error


@dataclass(frozen=True, slots=True)
class _Repair:
    """One repair of a cache whose metadata is sound."""

    request: Request
    attributes: CacheAttributes
    leases: Leases

    def run(self) -> dict[str, Any] | None:
        """Restore what can be restored without the base's forward pass; drop damaged blocks.

        Returns what a sound manifest said of the run and was dropped with it, else None.

        Raises ``CacheError`` if tokens cannot be restored. Nothing is changed then.
        """
        out, progress = self.request.out, self.request.progress
        for split in SPLITS:
            for marker in _sound_markers(out, split).values():
                promote(out, marker)  # of a repair that was stopped
        clear_staging(out)
        found = verify_idle(out, deep=True, progress=progress)
        if found.complete and not found.faults:
            progress.say("nothing is damaged")
            for split in SPLITS:
                drop_superseded(out, split)
            return None
        for fault in found.faults:
            progress.say(f"damaged: {fault}")
        manifest, digests = _digests(out)
        if self._restore_digest_tables(found, digests):
            found = verify_idle(out, deep=True, progress=progress)  # files that they vouch for, too
        kinds = {fault.kind for fault in found.faults}
        self._restore_tokens(found, digests)
        if "digests" in kinds:
            publish_digests(out, digests)
        if manifest is not None and "codec" in kinds:
            self._restore_calibration(manifest.codec)
        for split in SPLITS:
            self._drop_damaged_blocks(split, found, manifest)
        if (out / "base").is_dir() and (manifest is None or "base" in kinds):
            self._require_turn()
            shutil.rmtree(out / "base")
        self._require_turn()
        (out / MANIFEST).unlink(missing_ok=True)
        fsync_path(out)
        return None if manifest is None or "manifest" in kinds else manifest.extracted

    def _require_turn(self) -> None:
        """Raise ``OutputError`` if this process slept and others took its place."""
        self.leases.require(COORDINATOR)

    @contextmanager
    def _tokens_again(self) -> Iterator[Path]:
        """Run pass 0 again in a folder of its own, which is removed in the end."""
        out, corpus = self.request.out, self.request.corpus or corpus_of(self.attributes)
        if corpus is None:
            raise CacheError(
                f"{out} cannot be repaired: its tokens are damaged, and it was merged from several "
                "caches. Merge them again into a new folder (`embedcache.verify()` names them)"
            )
        staging = out / STAGING / "pass0"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            writer = TokensWriter(out, staging, self.attributes.settings.block_tokens)
            tokenise(writer, corpus, self.request.tokenizer(), self.request.progress)
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _restore_digest_tables(self, found: Verification, digests: Digests) -> bool:
        """Restore damaged digest tables of pass 0 from its files, else from the corpus.

        Returns whether any was damaged.
        """
        out = self.request.out
        damaged = {fault.file for fault in found.faults if fault.kind == "digest_table"}
        splits = [split for split in SPLITS if tokens_digest_table(split) in damaged]
        made = out / STAGING / "digest_tables"

        def restored(root: Path, split: str) -> bool:
            name = tokens_digest_table(split)
            with suppress(OSError):  # a file is missing or cannot be read
                table = write_tokens_digest_table(root, split, digests.metadata, into=made)
                if table == digests.digest_tables[name]:
                    _place(made / name, out / name)
                    return True
            return False

        try:
            left = [split for split in splits if not restored(out, split)]
            if left:
                with self._tokens_again() as staging:
                    for split in left:
                        if not restored(staging, split):
                            raise _another_corpus(out / tokens_digest_table(split))
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return bool(splits)

    def _restore_tokens(self, found: Verification, digests: Digests) -> None:
        """Restore the damaged files of pass 0 from the corpus, all or none."""
        out = self.request.out
        damaged = {fault.file for fault in found.faults if fault.kind == "tokens"}
        if not damaged:
            return
        records = [
            record
            for split in SPLITS
            for name, record in TokenFiles(out, split, digests).records()
            if name in damaged and record is not None
        ]
        with self._tokens_again() as staging:
            for record in records:
                if not _is_whole(staging, (record,)):
                    raise _another_corpus(out / record.path)
            for record in records:
                _place(staging / record.path, out / record.path)

    def _restore_calibration(self, expected: Digests) -> None:
        """Calibrate the codec again; the result must be what blocks were encoded with."""
        settings, out = self.attributes.settings, self.request.out
        base = self.request.load_base(self.attributes.environment["dtype"])
        forward = BlockForward(
            base,
            settings.taps,
            block_tokens=settings.block_tokens,
            batch_tokens=settings.batch_tokens,
        )
        train = SplitTokens(out, "train", settings.block_tokens)
        with self.request.progress.bar("calibrating the codec", None, ""):
            found = new_calibrations(train, forward, base, settings, ComputedBatches())
        self._require_turn()
        store_calibrations(out, found, self.leases.staging, expected=expected)

    def _drop_damaged_blocks(
        self, split: str, found: Verification, manifest: Manifest | None
    ) -> None:
        """Remove the markers of damaged blocks; write the lost markers of sound ones again."""
        out, settings = self.request.out, self.attributes.settings
        tokens = SplitTokens(out, split, settings.block_tokens)
        files = None if manifest is None else manifest.splits[split].files(out, split, settings)
        markers, newest = _sound_markers(out, split), newest_generations(out, split)
        with closing(BlockWriter(out)) as writer:
            for block in {fault.block for fault in found.faults if fault.split == split}:
                assert block is not None
                marker = markers.get(block)
                names = {*block_shards(split, block, settings)}
                if (
                    marker is not None
                    and {record.path for record in marker.files} == names
                    and _is_whole(out, marker.files)
                ):
                    continue  # computed by a repair that was stopped before its manifest
                with suppress(CacheError):  # a damaged digest table is reported by verify
                    if files is not None and _is_whole(out, files[block]):
                        writer.renew(
                            split,
                            block,
                            files[block],
                            quarantined=tuple(files.quarantined_in(*tokens.bounds(block)).tolist()),
                            generation=newest.get(block, -1) + 1,
                        )
                        continue
                self._require_turn()
                for path in (out / COMMITS / split).glob(f"{block:08d}.*.json"):
                    path.unlink()
        for block, path in committed_blocks(out, split).items():
            if block >= tokens.blocks:
                path.unlink()


def _place(made: Path, target: Path) -> None:
    """Move a restored file to its place."""
    fsync_path(made)
    make_folder(target.parent)
    made.replace(target)
    fsync_path(target.parent)


def _another_corpus(damaged: Path) -> CacheError:
    return CacheError(
        f"{damaged} is damaged, and the corpus no longer yields the tokens that it held: expected "
        "the corpus (and the versions of embedcache and zarr) that the cache was made from. "
        "Restore the corpus or that file, or extract into a new folder"
    )


def _is_whole(out: Path, records: tuple[FileRecord, ...]) -> bool:
    """Return whether every file is there with its SHA-256."""
    return all(content_fault(out, record) is None for record in records)


def _sound_markers(out: Path, split: str) -> dict[int, Marker]:
    """Return the newest markers that can be read and are in their own place."""
    markers = {}
    for block, path in committed_blocks(out, split).items():
        try:
            marker = Marker.read(path)
        except (CacheError, OSError):
            continue  # reported by verify
        if (marker.split, f"{marker.block:08d}.{marker.generation}.json") == (split, path.name):
            markers[block] = marker
    return markers
