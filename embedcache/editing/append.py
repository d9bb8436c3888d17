"""Adding documents to a finished cache.

They are extracted into a cache of their own inside its staging folder, which shares its base and
its codec's calibration, and is joined onto it by one `rewrite`: the blocks that are there stay as
they are. What the new cache is, and so when it must be begun anew, is told by the hash of the
manifest that it is to come ``onto``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedcache.base.identity import BaseIdentity
from embedcache.base.load import load_identity, load_tokenizer
from embedcache.cache.blocks.commit import clear_staging
from embedcache.cache.cache import read_attributes
from embedcache.cache.format.layout import CODEC, MANIFEST, SPLITS, CacheAttributes
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.reader import CorpusReader
from embedcache.device import resolve_device, resolve_dtype
from embedcache.editing.append_request import HeldDocuments, require_settings
from embedcache.editing.join import join
from embedcache.editing.merge_parts import Part, require_alike
from embedcache.errors import BaseModelError, OutputError, UsageError
from embedcache.extraction.extract import extract
from embedcache.extraction.plan import Earlier, environment_of, write_tokens
from embedcache.progress import SILENT, Progress
from embedcache.store.files import STAGING, copy_tree, fsync_path, translate_write_errors
from embedcache.store.lease import COORDINATOR, Leases
from embedcache.store.transaction import begin_transaction, commit_transaction, finish_transaction

FOLDER = f"{STAGING}/append"


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """What was added, or would be; counts are of new documents alone, by split.

    ``bytes`` and ``seconds`` of what would be are those of what is there, in proportion.
    """

    cache: str
    documents: dict[str, int]
    sequences: dict[str, int]
    tokens: dict[str, int]
    already_there: int
    """Documents passed over because the cache has them."""
    elsewhere: int
    """Documents asked into one split whose like, or they themselves, were in another."""
    bytes: int
    seconds: float
    dry_run: bool


def append(
    corpus: CorpusConfig,
    *,
    out: Path,
    base: str | None = None,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_quarantined: float = 0.01,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Appended:
    """Add the documents of a corpus to the finished cache at ``out``, those that it does not have.

    An append that was killed goes on by the same call; until it is done, readers see the cache as
    it was, or, while files are put in place, none.

    Args:
        corpus: what to read; `append_request.corpus_like` makes one like the cache's.
        out: the cache.
        base: where its base is, if not where it was.
        revision: the hub revision of that.
        settings: of extraction, by name, that the cache must have; the others are its own anyway.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, or that which the cache was computed in.
        max_quarantined: share of the new sequences that may be put aside as not finite.
        dry_run: say what would be added, and write nothing.
        progress: told of every stage.

    Raises:
        IdentityError: for another base.
        UsageError: for a setting that is not the cache's.
        OutputError: while others write there, or where another append was begun and not finished.
        CacheError: for a cache that is incomplete or damaged.
        EmbedcacheError: for what `extract` raises. Whatever is raised, the cache is as it was.
    """
    request = _Request(corpus, base, revision, settings or {}, device, dtype, max_quarantined)
    if dry_run:
        return _Appending(out, request, progress).preview()
    read_attributes(out)
    leases = Leases(out)
    with translate_write_errors(out), leases:
        leases.require_alone("--append")
        with leases.coordinating(progress):
            leases.require_alone("--append")  # one may have come to wait just now
            finished = finish_transaction(out) or {}
            if finished:
                progress.say(f"finished what was begun on {out} and cut short")
            if finished.get("config") == corpus.to_dict():
                shutil.rmtree(out / FOLDER, ignore_errors=True)
                return Appended(**finished["appended"])
            return _Appending(out, request, progress).run(leases)


@dataclass(frozen=True, slots=True)
class _Request:
    corpus: CorpusConfig
    base: str | None
    revision: str | None
    settings: Mapping[str, Any]
    device: str
    dtype: str
    max_quarantined: float


class _Appending:
    """One append to a cache that is whole; everything asked for is checked first."""

    def __init__(self, out: Path, request: _Request, progress: Progress):
        self._out, self._staged = out, out / FOLDER
        self._request, self._corpus, self._progress = request, request.corpus, progress
        self._cache = Part(out)
        self._onto = self._cache.cache.manifest.hash
        attributes = self._cache.cache.attributes
        for asked in (request.settings, {"context": self._corpus.context}):
            require_settings(attributes.settings, asked, out)
        self._dtype = attributes.environment["dtype"]
        if request.dtype not in ("auto", self._dtype):
            raise UsageError(
                f"{out} was computed in {self._dtype}, and what is added to it must be like it; "
                f"found --dtype {request.dtype}. Leave --dtype out"
            )
        self._base = request.base or attributes.base["name"]
        try:
            self._identity = load_identity(self._base, revision=request.revision)
        except BaseModelError as error:
            raise BaseModelError(
                f"{error} (The base of {out} was there when it was made: type --base with where it "
                "is now.)"
            ) from error
        BaseIdentity.from_dict(attributes.base).require(
            self._identity, this=f"the cache {out}", that=f"--base {self._base}"
        )
        self._held = HeldDocuments(self._cache.tables)

    def preview(self) -> Appended:
        """Return what would be added."""
        reader = CorpusReader(self._corpus, self._tokenizer(), self._held)
        with self._progress.bar("tokenising", None, "tok") as bar:
            for document in reader:
                bar.advance(sum(len(sequence.ids) for sequence in document.sequences))
        manifest, tokens = self._cache.cache.manifest, reader.summary.tokens
        plain = 2 * self._identity.hidden_size * len(self._cache.settings.taps)
        sealed = sum(files.bytes for files in self._cache.sealed.values())
        sealed_each = sealed / sum(split.tokens for split in manifest.splits.values())
        each = {n: s.bytes / s.tokens if s.tokens else plain for n, s in manifest.splits.items()}
        speed = manifest.extracted["tokens_per_second"]
        return self._told(
            asdict(reader.summary),
            bytes=int(sum(count * (each[name] + sealed_each) for name, count in tokens.items())),
            seconds=round(sum(tokens.values()) / speed, 3) if speed else 0.0,
            dry_run=True,
        )

    def run(self, leases: Leases) -> Appended:
        """Extract the new documents beside, and join them onto the cache."""
        summary = self._seal(leases)
        if not any(summary["documents"].values()):
            shutil.rmtree(self._staged)
            return self._told(summary, bytes=0, seconds=0.0)
        self._share()
        request = self._request
        done = extract(
            self._corpus,
            base=self._base,
            out=self._staged,
            settings=self._cache.settings,
            revision=request.revision,
            device=request.device,
            dtype=self._dtype,
            max_quarantined=request.max_quarantined,
            progress=self._progress,
        )
        addition = Part(self._staged)
        require_alike(self._cache, addition)
        told = self._told(summary, bytes=addition.bytes, seconds=done.seconds)
        leases.require(COORDINATOR)
        clear_staging(self._out, {self._staged.name})  # of appends that were killed
        try:
            self._join(addition, told, leases)
        finally:
            shutil.rmtree(leases.staging, ignore_errors=True)
        shutil.rmtree(self._staged)
        return told

    def _seal(self, leases: Leases) -> dict[str, Any]:
        """Have the tokens of the new documents sealed; return the corpus's summary."""
        if (begun := self._begun()) is not None:
            return dict(begun.corpus["summary"])
        request = self._request
        device = resolve_device(request.device)
        shutil.rmtree(self._staged, ignore_errors=True)
        try:
            attributes = write_tokens(
                self._corpus,
                self._tokenizer(),
                self._identity,
                self._cache.settings,
                environment_of(device, resolve_dtype(self._dtype, device)),
                self._staged,
                self._progress,
                holds=lambda: leases.holds(COORDINATOR),
                onto=Earlier(manifest=self._onto, documents=self._held),
            )
        except BaseException:
            shutil.rmtree(self._staged, ignore_errors=True)
            raise
        return dict(attributes.corpus["summary"])

    def _begun(self) -> CacheAttributes | None:
        """Return what this very append sealed earlier; raises ``OutputError`` for another's."""
        if not (self._staged / "zarr.json").is_file():
            return None
        found = read_attributes(self._staged)
        if found.corpus.get("onto") != self._onto:
            return None  # of what the cache is no more; one without was begun by one that slept
        if found.corpus["config"] != self._corpus.to_dict():
            raise OutputError(
                f"an append of {', '.join(found.corpus['config']['sources'])} to {self._out} was "
                "begun and is not finished, expected the same again: type that to go on with it, "
                f"or drop it with: rm -r {self._staged}"
            )
        return found

    def _share(self) -> None:
        """Give the new cache the base and the calibration, by links to their files."""
        for name in ("base", CODEC):
            if (self._out / name).is_dir() and not (self._staged / name).is_dir():
                partial = self._staged / STAGING / name
                shutil.rmtree(partial, ignore_errors=True)
                copy_tree(self._out / name, partial, os.link)
                partial.rename(self._staged / name)
                fsync_path(self._staged)

    def _join(self, addition: Part, told: Appended, leases: Leases) -> None:
        """Put the new blocks in place."""
        attributes, new = self._cache.cache.attributes, addition.cache.attributes
        entry = new.corpus | {"environment": new.environment}
        corpus = attributes.corpus
        corpus = corpus | {"appended": [*corpus.get("appended", ()), entry]}
        names = [
            {name: name for table in part.tables.values() for name in table.names}
            for part in (self._cache, addition)
        ]
        times = self._cache.cache.manifest.extracted.get("appended", {})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        join(
            [self._cache, addition],
            names,
            begin_transaction(leases.staging),
            replace(attributes, corpus=corpus),
            self._progress,
            onto_first=True,
            about={"appended": {**times, self._onto: now}},
        )
        about = {"appended": asdict(told), "config": self._corpus.to_dict()}
        leases.require(COORDINATOR)
        commit_transaction(self._out, leases.staging, last=MANIFEST, remove=[], about=about)

    def _tokenizer(self) -> Any:
        return load_tokenizer(self._base, revision=self._request.revision)

    def _told(
        self, summary: dict[str, Any], *, bytes: int, seconds: float, dry_run: bool = False
    ) -> Appended:
        counts = {
            key: {name: summary[key][name] for name in SPLITS}
            for key in ("documents", "sequences", "tokens")
        }
        return Appended(
            cache=str(self._out),
            **counts,
            already_there=summary["already_there"],
            elsewhere=summary["elsewhere"],
            bytes=bytes,
            seconds=seconds,
            dry_run=dry_run,
        )
