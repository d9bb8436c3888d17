"""What ``extract --repair`` does before it computes: puts back what can be, finds what cannot.

What is sound is never moved or removed before its successor is in place, and each step may be cut
short: the next run finds what is left to do as it found the damage, by `verify`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

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
    MANIFEST,
    SPLITS,
    TOKENS_DIGESTS,
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
from embedcache.corpus.config import CorpusConfig
from embedcache.errors import CacheError
from embedcache.extraction.plan import tokenise
from embedcache.progress import Progress
from embedcache.store.files import STAGING, fsync_path, make_folder, publish_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What is left to compute: every block without a marker here, and the base's if ``base``.

    ``codec`` is what the codec's calibration must come to, where it is to be made anew.
    ``extracted`` is what the first run saw, where the manifest that says so is sound.
    """

    markers: dict[str, dict[int, Marker]]
    base: bool
    codec: Digests | None
    extracted: dict[str, Any] | None

    def sound(self) -> Iterator[Marker]:
        """Yield the markers of all splits."""
        return chain.from_iterable(found.values() for found in self.markers.values())


def restore_metadata(out: Path) -> None:
    """Put every ``zarr.json`` back that pass 0 wrote, so that the cache can be opened.

    Raises ``CacheError`` where ``out`` is no cache, or nothing in it says what it held.
    """
    if not any((out / name).is_file() for name in (METADATA, MANIFEST, TOKENS_DIGESTS)):
        raise CacheError(f"{out} holds no cache to repair: run 'embedcache extract' without it")
    for name, text in _vouched(out)[1].metadata.items():
        for partial in (out / name).parent.glob(f".{METADATA}.*.partial"):
            partial.unlink()  # of a repair that was stopped as it published one
        if metadata_fault(out / name, text) is not None:
            publish_bytes(out / name, text.encode())


def _vouched(out: Path) -> tuple[Manifest | None, Digests]:
    """Return the manifest, where it can be trusted, and the seal of pass 0, from either file."""
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
            f"{out} cannot be repaired: nothing says what its tokens were, as neither {MANIFEST} "
            f"nor {TOKENS_DIGESTS} is whole. Restore one of them, or extract into a new folder."
        ) from error


def mend(
    out: Path,
    corpus: CorpusConfig | None,
    load_tokenizer: Callable[[], Any],
    settings: ExtractSettings,
    progress: Progress,
) -> Mended | None:
    """Restore everything but embeddings; return what is to be computed, None if nothing is.

    Call with the cache to itself, after `restore_metadata`. Raises ``CacheError`` where sealed
    tokens are damaged and the corpus no longer yields them, or is None: a merged cache's is of
    several, some of whose documents may be gone. Nothing is changed then.
    """
    for split in SPLITS:
        for marker in _sound_markers(out, split).values():
            promote(out, marker)  # what a repair that was stopped had committed
    clear_staging(out)
    found = verify_idle(out, deep=True, progress=progress)
    if found.complete and not found.faults:
        progress.say("nothing is damaged")
        for split in SPLITS:
            drop_superseded(out, split)
        return None
    for fault in found.faults:
        progress.say(f"damaged: {fault}")
    manifest, seal = _vouched(out)

    def pass_zero() -> AbstractContextManager[Path]:
        if corpus is None:
            raise CacheError(
                f"{out} cannot be repaired: its tokens are damaged, and of a merged cache they are "
                "in those that it was merged from alone. Type: embedcache merge, of these, with a "
                f"new --out ('embedcache verify {out} --deep' names them)"
            )
        return _pass_zero(out, corpus, load_tokenizer(), settings, progress)

    if _restore_ledgers(out, found, seal, pass_zero):
        found = verify_idle(
            out, deep=True, progress=progress
        )  # of the files that they vouch for, too
    kinds = {fault.kind for fault in found.faults}
    _restore_tokens(out, found, seal, pass_zero)
    if any(fault.kind == "digests" for fault in found.faults):
        publish_digests(out, seal)
    return Mended(
        markers={split: _mend_blocks(out, split, found, manifest, settings) for split in SPLITS},
        base=manifest is None or "base" in kinds,
        codec=manifest.codec if manifest is not None and "codec" in kinds else None,
        extracted=None if manifest is None or "manifest" in kinds else manifest.extracted,
    )


@contextmanager
def _pass_zero(
    out: Path, corpus: CorpusConfig, tokenizer: Any, settings: ExtractSettings, progress: Progress
) -> Iterator[Path]:
    """Run pass 0 again in a folder beside the cache, which is removed in the end."""
    staging = out / STAGING / "pass0"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        tokenise(TokensWriter(out, staging, settings.block_tokens), corpus, tokenizer, progress)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _restore_ledgers(
    out: Path,
    found: Verification,
    seal: Digests,
    pass_zero: Callable[[], AbstractContextManager[Path]],
) -> bool:
    """Make the damaged digest tables of pass 0 anew, from its files or else from the corpus.

    Returns whether there were any.
    """
    damaged = {fault.file for fault in found.faults if fault.kind == "digest_table"}
    splits = [split for split in SPLITS if tokens_digest_table(split) in damaged]

    made = out / STAGING / "digest_tables"

    def restored(root: Path, split: str) -> bool:
        name = tokens_digest_table(split)
        with suppress(OSError):  # a file is gone, or the disk cannot read it
            if (
                write_tokens_digest_table(root, split, seal.metadata, into=made)
                == seal.digest_tables[name]
            ):
                _place(made / name, out / name)
                return True
        return False

    try:
        left = [split for split in splits if not restored(out, split)]
        if left:
            with pass_zero() as staging:
                for split in left:
                    if not restored(staging, split):
                        raise _no_longer(out / tokens_digest_table(split))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return bool(splits)


def _restore_tokens(
    out: Path,
    found: Verification,
    seal: Digests,
    pass_zero: Callable[[], AbstractContextManager[Path]],
) -> None:
    """Take the damaged files of pass 0 from another one, all or none."""
    damaged = {fault.file for fault in found.faults if fault.kind == "tokens"}
    if not damaged:
        return
    records = [
        record
        for split in SPLITS
        for name, record in TokenFiles(out, split, seal).records()
        if name in damaged and record is not None
    ]
    with pass_zero() as staging:
        for record in records:
            if not _whole(staging, (record,)):
                raise _no_longer(out / record.path)
        for record in records:
            _place(staging / record.path, out / record.path)


def _place(made: Path, target: Path) -> None:
    """Put a file that was made anew in its place."""
    fsync_path(made)
    make_folder(target.parent)
    made.replace(target)
    fsync_path(target.parent)


def _no_longer(damaged: Path) -> CacheError:
    return CacheError(
        f"{damaged} is damaged, and the corpus no longer yields the tokens that it held: expected "
        "the corpus (and the versions of embedcache and zarr) that the cache was made from. "
        "Restore the corpus or that file, or extract into a new folder."
    )


def _mend_blocks(
    out: Path,
    split: str,
    found: Verification,
    manifest: Manifest | None,
    settings: ExtractSettings,
) -> dict[int, Marker]:
    """Return the marker of every sound block; one that was lost is written anew."""
    tokens = SplitTokens(out, split, settings.block_tokens)
    files = None if manifest is None else manifest.splits[split].files(out, split, settings)
    markers = _sound_markers(out, split)
    newest = newest_generations(out, split)
    with closing(BlockWriter(out)) as writer:
        for block in {fault.block for fault in found.faults if fault.split == split}:
            assert block is not None
            marker = markers.pop(block, None)
            names = {*block_shards(split, block, settings)}
            if (
                marker is not None
                and {record.path for record in marker.files} == names
                and _whole(out, marker.files)
            ):
                markers[block] = marker  # of a repair that was stopped before its manifest
                continue
            with suppress(CacheError):  # a damaged digest table is told by verify
                if files is not None and _whole(out, files[block]):
                    markers[block] = writer.renew(
                        split,
                        block,
                        files[block],
                        quarantined=tuple(files.quarantined_in(*tokens.bounds(block)).tolist()),
                        generation=newest.get(block, -1) + 1,
                    )
    for block, path in committed_blocks(out, split).items():
        if block >= tokens.blocks:
            path.unlink()
            markers.pop(block, None)
    return markers


def _whole(out: Path, records: tuple[FileRecord, ...]) -> bool:
    """Whether every file is there with its SHA-256."""
    return all(content_fault(out, record) is None for record in records)


def _sound_markers(out: Path, split: str) -> dict[int, Marker]:
    """Return the newest markers that can be read and are in their own place."""
    markers = {}
    for block, path in committed_blocks(out, split).items():
        try:
            marker = Marker.read(path)
        except (CacheError, OSError):
            continue  # told by verify
        if (marker.split, f"{marker.block:08d}.{marker.generation}.json") == (split, path.name):
            markers[block] = marker
    return markers
