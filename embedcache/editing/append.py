"""Appending documents to a finished cache.

The new documents are extracted into a cache of their own inside the staging folder of the cache. It
shares the base and the calibration of the codec. Its blocks are then put behind those of the cache.
An extraction that was interrupted is resumed by the same call, as long as the cache is the one that
it was begun for: the staged corpus records the hash of that manifest as ``onto``.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.base.identity import BaseIdentity
from embedcache.base.load import load_identity, load_tokenizer
from embedcache.cache.cache import read_attributes
from embedcache.cache.format.layout import (
    CODEC,
    SPLITS,
    CacheAttributes,
    ExtractSettings,
    corpora_of,
)
from embedcache.cache.tokens.tables import SplitTables
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup import CachedDocument, Fingerprint
from embedcache.corpus.documents import Split
from embedcache.corpus.reader import CorpusReader
from embedcache.device import resolve_device, resolve_dtype
from embedcache.editing.concatenate import (
    block_bytes,
    concatenate,
    concatenated_measurements,
    require_compatible,
)
from embedcache.editing.edit import FinishedCache, sole_writer, staged_edit
from embedcache.errors import BaseModelError, OutputError, UsageError
from embedcache.extraction.extract import extract
from embedcache.extraction.plan import Earlier, environment_of, write_tokens
from embedcache.progress import SILENT, Progress
from embedcache.store.files import STAGING, copy_tree, fsync_path
from embedcache.store.lease import COORDINATOR, Leases

FOLDER = f"{STAGING}/append"
READING = ("encoding", "undecodable", "min_tokens", "max_tokens_per_document", "split_seed")
FIELDS = ("text_field", "prompt", "completion", "messages_field")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendSummary:
    """The documents that were appended, or that a dry run would append.

    A dry run estimates ``bytes`` and ``seconds`` from those of the cache, in proportion to tokens.
    """

    cache: str
    documents: dict[str, int]
    """New ones, by split, like the two counts that follow."""
    sequences: dict[str, int]
    tokens: dict[str, int]
    already_there: int
    """Documents that were passed over, because the cache has them."""
    elsewhere: int
    """Documents that are in another split than asked, where they or near-duplicates were before."""
    bytes: int
    seconds: float
    dry_run: bool


def append(
    cache: str | Path,
    corpus: CorpusConfig | str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_quarantined: float = 0.01,
    dry_run: bool = False,
    progress: Progress = SILENT,
    **corpus_settings: Any,
) -> AppendSummary:
    """Append the documents of a corpus to a finished cache, except those that it has already.

    Near-duplicates of documents in the cache go to the same split. Training runs that were begun
    before need the cache as it was. An interrupted append is resumed by the same call; until then,
    readers see the cache as it was or, while files are moved into place, an incomplete cache.

    Args:
        cache: the cache.
        corpus: the sources, or the whole configuration. Sources are read as `corpus_like` says.
        base: a hub id, a directory or a GGUF file; the base of the cache by default, where it was.
        revision: the hub revision of ``base``.
        settings: extraction settings, by name, that the cache is required to have.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, or the dtype that the cache was computed in.
        max_quarantined: the largest share of new sequences whose embeddings may be not finite.
        dry_run: return the summary, but write nothing.
        progress: receives a bar for each stage.
        corpus_settings: further settings of `CorpusConfig`, by name.

    Returns:
        The counts of the new documents.

    Raises:
        IdentityError: if ``base`` is another base.
        BaseModelError: if ``base`` is not found.
        UsageError: if a setting is not the cache's.
        CorpusError: if the corpus cannot be read.
        OutputError: if another process writes the cache, or if another append to it is unfinished.
        CacheError: if the cache is incomplete or damaged.
        EmbedcacheError: as `extract` does. The cache is as it was after any error.
    """
    path = Path(cache)
    config = _corpus_config(read_attributes(path), corpus, corpus_settings)
    begin = partial(
        _Append,
        path,
        config,
        base=base,
        revision=revision,
        settings=settings or {},
        device=device,
        dtype=dtype,
        max_quarantined=max_quarantined,
        progress=progress,
    )
    if dry_run:
        return begin().preview()
    with sole_writer(path, "append", progress) as (leases, finished):
        if finished.get("verb") == "append" and finished["request"] == config.to_dict():
            shutil.rmtree(path / FOLDER, ignore_errors=True)
            return AppendSummary(**finished["result"])
        return begin().run(leases)


def corpus_like(
    cache: str | Path, sources: str | Path | Sequence[str | Path], **settings: Any
) -> CorpusConfig:
    """Return the configuration to read more documents for a cache, as its first corpus was read.

    Settings that are not given are those of the first corpus of the cache, if they say how records
    become text, how documents are cut and what shares of them become dev and test. A share is 0
    where dev or test had sources of their own or were listed. Limits and data set options are never
    taken over.

    Args:
        cache: the cache.
        sources: one or more files, folders, glob patterns or data sets.
        settings: settings of `CorpusConfig`, by name.

    Raises:
        CacheError: if ``cache`` is no cache.
        UsageError: if a setting is unknown, or settings contradict each other.
    """
    return _corpus_config(read_attributes(Path(cache)), sources, settings)


def _corpus_config(
    attributes: CacheAttributes,
    corpus: CorpusConfig | str | Path | Sequence[str | Path],
    settings: Mapping[str, Any],
) -> CorpusConfig:
    if isinstance(corpus, CorpusConfig):
        return CorpusConfig.from_dict({**corpus.to_dict(), **settings}) if settings else corpus
    sources = [corpus] if isinstance(corpus, str | Path) else corpus
    first = CorpusConfig.from_dict(corpora_of(attributes.corpus)[0]["config"])
    names = READING if settings.keys() & {*FIELDS} else (*READING, *FIELDS)
    dev, test = (0.0, 0.0) if first.split_file else first.fractions
    inherited = {name: getattr(first, name) for name in names} | {
        "context": attributes.settings.context,
        "dev_fraction": dev,
        "test_fraction": test,
    }
    return CorpusConfig.from_dict({**inherited, "sources": [*map(str, sources)], **settings})


class _Append:
    """One append to a finished cache; its arguments are checked when it is made."""

    def __init__(
        self,
        path: Path,
        corpus: CorpusConfig,
        *,
        base: str | None,
        revision: str | None,
        settings: Mapping[str, Any],
        device: str,
        dtype: str,
        max_quarantined: float,
        progress: Progress,
    ):
        self._cache = FinishedCache(path)
        self._staged = path / FOLDER
        self._corpus = corpus
        self._revision = revision
        self._device = device
        self._max_quarantined = max_quarantined
        self._progress = progress
        attributes = self._cache.attributes
        for required in (settings, {"context": corpus.context}):
            _require_settings(attributes.settings, required, path)
        self._dtype = attributes.environment["dtype"]
        if dtype not in ("auto", self._dtype):
            raise UsageError(
                f"expected `dtype=` {self._dtype}, in which {path} was computed, found {dtype}. "
                "Leave `dtype=` out."
            )
        self._base = base or attributes.base["name"]
        try:
            self._identity = load_identity(self._base, revision=revision)
        except BaseModelError as error:
            raise BaseModelError(
                f"{error} {path} was extracted from this base: give its present place as `base=`."
            ) from error
        BaseIdentity.from_dict(attributes.base).require(
            self._identity, this=f"the cache {path}", that=f"`base=` {self._base}"
        )
        self._documents = _Documents(self._cache.tables)

    def preview(self) -> AppendSummary:
        """Return the summary that `run` would return, with estimates of bytes and seconds."""
        reader = CorpusReader(self._corpus, self._tokenizer(), self._documents)
        with self._progress.bar("tokenising", None, "tok") as bar:
            for document in reader:
                bar.advance(sum(len(sequence.ids) for sequence in document.sequences))
        manifest, tokens = self._cache.manifest, reader.summary.tokens
        lossless = 2 * self._identity.hidden_size * len(self._cache.settings.taps)
        files, splits = self._cache.token_files.values(), manifest.splits.values()
        token_bytes = sum(f.bytes for f in files) / sum(split.tokens for split in splits)
        each = {n: s.bytes / s.tokens if s.tokens else lossless for n, s in manifest.splits.items()}
        speed = manifest.extracted["tokens_per_second"]
        return self._summary(
            asdict(reader.summary),
            bytes=int(sum(count * (each[name] + token_bytes) for name, count in tokens.items())),
            seconds=round(sum(tokens.values()) / speed, 3) if speed else 0.0,
            dry_run=True,
        )

    def run(self, leases: Leases) -> AppendSummary:
        """Extract the new documents into the staging folder and append their blocks."""
        counts = self._write_tokens(leases)
        if not any(counts["documents"].values()):
            shutil.rmtree(self._staged)
            return self._summary(counts, bytes=0, seconds=0.0)
        self._share_base()
        done = extract(
            self._corpus,
            base=self._base,
            out=self._staged,
            settings=self._cache.settings,
            revision=self._revision,
            device=self._device,
            dtype=self._dtype,
            max_quarantined=self._max_quarantined,
            progress=self._progress,
        )
        addition = FinishedCache(self._staged)
        require_compatible(self._cache, addition)
        leases.require(COORDINATOR)
        summary = self._summary(counts, bytes=block_bytes(addition), seconds=done.seconds)
        self._concatenate(addition, summary, leases)
        shutil.rmtree(self._staged)
        return summary

    def _write_tokens(self, leases: Leases) -> dict[str, Any]:
        """Return the counts of the new documents, after writing their tokens if needed."""
        if (begun := self._begun()) is not None:
            return dict(begun.corpus["summary"])
        device = resolve_device(self._device)
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
                onto=Earlier(manifest=self._cache.manifest.hash, documents=self._documents),
            )
        except BaseException:
            shutil.rmtree(self._staged, ignore_errors=True)
            raise
        return dict(attributes.corpus["summary"])

    def _begun(self) -> CacheAttributes | None:
        """Return the attributes of an interrupted append of the same corpus, None if there is none.

        Raises ``OutputError`` if an append of another corpus was interrupted.
        """
        if not (self._staged / "zarr.json").is_file():
            return None
        found = read_attributes(self._staged)
        if found.corpus.get("onto") != self._cache.manifest.hash:
            return None  # the cache was edited since
        if found.corpus["config"] != self._corpus.to_dict():
            raise OutputError(
                f"expected the corpus of the unfinished append to {self._cache.path} "
                f"({', '.join(found.corpus['config']['sources'])}), found another one "
                f"({', '.join(self._corpus.sources)}). Run the first call again to finish it, or "
                f"remove the folder {self._staged} to drop it."
            )
        return found

    def _share_base(self) -> None:
        """Link the files of the base and of the codec's calibration into the staged cache."""
        for name in ("base", CODEC):
            source, target = self._cache.path / name, self._staged / name
            if source.is_dir() and not target.is_dir():
                links = self._staged / STAGING / name
                shutil.rmtree(links, ignore_errors=True)
                copy_tree(source, links, os.link)
                links.rename(target)
                fsync_path(self._staged)

    def _concatenate(self, addition: FinishedCache, summary: AppendSummary, leases: Leases) -> None:
        """Put the blocks of the staged cache behind those of the cache."""
        cache, new = self._cache, addition.attributes
        corpus = dict(cache.attributes.corpus)
        entry = new.corpus | {"environment": new.environment}
        corpus["appended"] = [*corpus.get("appended", ()), entry]
        times = cache.manifest.extracted.get("appended", {})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        extracted = concatenated_measurements([cache, addition])
        extracted["appended"] = {**times, cache.manifest.hash: now}
        with staged_edit(
            cache,
            replace(cache.attributes, corpus=corpus),
            leases,
            about={
                "verb": "append",
                "request": self._corpus.to_dict(),
                "result": asdict(summary),
            },
            extracted=extracted,
            keep={self._staged.name},
        ) as staged:
            concatenate([cache, addition], staged, self._progress)

    def _tokenizer(self) -> Any:
        return load_tokenizer(self._base, revision=self._revision)

    def _summary(
        self, counts: dict[str, Any], *, bytes: int, seconds: float, dry_run: bool = False
    ) -> AppendSummary:
        by_split = {
            key: {name: counts[key][name] for name in SPLITS}
            for key in ("documents", "sequences", "tokens")
        }
        return AppendSummary(
            cache=str(self._cache.path),
            **by_split,
            already_there=counts["already_there"],
            elsewhere=counts["elsewhere"],
            bytes=bytes,
            seconds=seconds,
            dry_run=dry_run,
        )


class _Documents:
    """The documents of a cache, in the order in which they were read; iterable more than once."""

    def __init__(self, tables: Mapping[str, SplitTables]):
        self._tables = tables

    def __iter__(self) -> Iterator[CachedDocument]:
        splits: tuple[Split, ...] = ("train", "dev", "test")
        places = heapq.merge(
            *(
                [(index, split, number) for number, index in enumerate(table.index_D.tolist())]
                for split in splits
                for table in [self._tables[split]]
            )
        )
        for _, split, number in places:
            table = self._tables[split]
            fingerprint = Fingerprint.unpacked(table.fingerprints[number])
            yield CachedDocument(table.names[number], split, fingerprint)


def _require_settings(settings: ExtractSettings, required: Mapping[str, Any], cache: Path) -> None:
    """Raise ``UsageError`` if the cache has another value for a required setting."""
    for name, value in required.items():
        if (found := getattr(settings, name)) != value:
            raise UsageError(
                f"expected `{name}=` {_words(found)}, the setting of {cache}, found "
                f"{_words(value)}. Leave `{name}=` out, or extract into another `out=`."
            )


def _words(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
