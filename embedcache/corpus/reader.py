"""The corpus as token sequences, in order: the first pass over it, and the only one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup.fingerprint import Fingerprint, Sketch, digest
from embedcache.corpus.dedup.near_duplicates import DuplicateIndex, Held
from embedcache.corpus.documents import Document
from embedcache.corpus.encoding import UndecodableError, encode
from embedcache.corpus.limits import Budget, Pieces
from embedcache.corpus.render.tokenise import Renderer, TokenisedDocument
from embedcache.corpus.sequences import Window, cut
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.corpus.splits import SplitChooser, SplitList
from embedcache.corpus.summary import CorpusSummary, Split
from embedcache.errors import CorpusError
from embedcache.store.files import canonical_json

BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1 << 20
PLACES = ("sources", "dev_sources", "test_sources", "split_file")
"""Settings that say where the corpus lies, not what it is."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """At most ``context`` consecutive tokens of one document."""

    document: int
    split: Split
    ids: npt.NDArray[np.uint32]
    """[T]"""
    loss_mask: npt.NDArray[np.bool_]
    """[T]; true where a token is a target, never for the first."""
    span: npt.NDArray[np.uint32]
    """[T, 2]; bytes of each token in its document's text."""


@dataclass(frozen=True, slots=True)
class DocumentSequences:
    """A document that has at least one sequence."""

    index: int
    """0, 1, 2, … in the order of the corpus."""
    name: str
    split: Split
    fingerprint: Fingerprint
    sequences: list[Sequence]


class CorpusReader:
    """Yields a corpus as sequences, document by document; ``summary`` counts along.

    Each iteration reads anew and gives the same. Documents that are ``held`` already are passed
    over; others get names and splits as if those had come before. Raises ``CorpusError`` for what
    cannot be read, and at the end where nothing is left to train on.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Any, held: Iterable[Held] = ()) -> None:
        self.config = config
        self.held = held
        self.renderer = Renderer(tokenizer, config)
        self.summary = CorpusSummary()

    def __iter__(self) -> Iterator[DocumentSequences]:
        self.summary = CorpusSummary()
        index = DuplicateIndex(self.held)
        try:
            yield from _Pass(self.config, self.renderer, self.summary, index).documents()
        finally:
            index.close()


class _Pass:
    """One reading of the corpus."""

    def __init__(
        self,
        config: CorpusConfig,
        renderer: Renderer,
        summary: CorpusSummary,
        index: DuplicateIndex,
    ) -> None:
        self.config = config
        self.renderer = renderer
        self.summary = summary
        self.index = index
        self.chooser = SplitChooser(config, index, summary)
        self.listed = SplitList(Path(config.split_file)) if config.split_file is not None else None
        self.count = 0
        self.pieces = Pieces()
        settings = {key: value for key, value in config.to_dict().items() if key not in PLACES}
        self.hash = hashlib.sha256(canonical_json(settings).encode())

    def documents(self) -> Iterator[DocumentSequences]:
        lists: tuple[tuple[tuple[str, ...], Split | None], ...] = (
            (self.config.sources, None),
            (self.config.dev_sources, "dev"),
            (self.config.test_sources, "test"),
        )
        stopped = False
        for sources, given in lists:
            budget = Budget(self.config)
            yield from self._list(sources, given, budget)
            stopped = stopped or budget.spent
        if self.listed is not None and not stopped:
            self.listed.check_complete()
        self._check_not_empty()

    def _list(
        self, sources: tuple[str, ...], given: Split | None, budget: Budget
    ) -> Iterator[DocumentSequences]:
        stream = iterate_documents(sources, self.config, self.renderer.tokenizer, self.summary)
        named = self._named(stream, given)
        while not budget.spent:
            batch = list(_batch(named, budget.documents))
            if not batch:
                return
            yield from self._batch_sequences(batch, budget)

    def _batch_sequences(
        self, batch: list[tuple[Document, str, Split | None]], budget: Budget
    ) -> Iterator[DocumentSequences]:
        tokens = self._tokens([document for document, _, _ in batch])
        for (document, name, split), tokenised in zip(batch, tokens, strict=True):
            if tokenised is None:
                continue
            result = self._sequences(document, name, split, tokenised, budget)
            if result is not None:
                yield result
            if budget.spent:
                return

    def _named(
        self, documents: Iterable[Document], given: Split | None
    ) -> Iterator[tuple[Document, str, Split | None]]:
        whole = ""
        for document in documents:
            split = given
            if self.listed is not None:
                split = self.listed.split_of(document)
                if split is None:
                    self.summary.unlisted += 1
                    continue
            if document.part < 2:
                whole = self.index.unique_name(document.name)
            yield document, f"{whole}#{document.part}" if document.part else whole, split

    def _tokens(self, documents: list[Document]) -> list[TokenisedDocument | None]:
        if self.config.undecodable == "error":
            return list(self.renderer.batch_tokens(documents))
        sound: list[bool] = []
        for document in documents:
            try:
                encode(document.text, document.label)
            except UndecodableError:
                self.summary.skipped_undecodable += 1
                sound.append(False)
            else:
                sound.append(True)
        tokens = iter(self.renderer.batch_tokens(list(itertools.compress(documents, sound))))
        return [next(tokens) if fine else None for fine in sound]

    def _sequences(
        self,
        document: Document,
        name: str,
        given: Split | None,
        tokens: TokenisedDocument,
        budget: Budget,
    ) -> DocumentSequences | None:
        limit = self.pieces.limit(document, self.config.max_tokens_per_document, len(tokens.ids))
        windows = cut(tokens, self.config.context, self.renderer.bos, limit)
        kept = budget.take(window for window in windows if self._keeps(window, document))
        if not kept:
            return None
        known = digest(document, tokens.data)
        there = self.index.held_in(known)
        if there is not None:
            self.summary.already_there += 1
            self.summary.elsewhere += given not in (None, there)
            self.pieces.split = there
            return None
        split = self.pieces.split if document.part > 1 else None
        sketch = None
        if split is None:
            own = document.own_text
            sketch = Sketch.of(tokens.data if own is None else _judged(own))
            split = self.chooser.choose(sketch, given)
        self.pieces.split = split
        self._count(document, name, split, tokens, kept)
        sequences = [
            Sequence(self.count, split, window.ids, window.loss_mask, window.span)
            for window in kept
        ]
        self.count += 1
        return DocumentSequences(self.count - 1, name, split, Fingerprint(known, sketch), sequences)

    def _keeps(self, window: Window, document: Document) -> bool:
        if document.kind == "text":
            short = len(window.ids) < self.config.min_tokens
            self.summary.dropped_short += short
            return not short
        learns = bool(window.loss_mask.any())
        self.summary.dropped_without_target += not learns
        return learns

    def _count(
        self,
        document: Document,
        name: str,
        split: Split,
        tokens: TokenisedDocument,
        kept: list[Window],
    ) -> None:
        self.summary.documents[split] += 1
        self.summary.sequences[split] += len(kept)
        self.summary.tokens[split] += sum(len(window.ids) for window in kept)
        self.summary.target_tokens[split] += sum(int(window.loss_mask.sum()) for window in kept)
        parts = [[len(segment.text), segment.target] for segment in document.segments]
        head = canonical_json([name, split, document.closed, parts, len(tokens.data)])
        self.hash.update(head.encode() + b"\n" + tokens.data)
        self.summary.corpus_sha256 = self.hash.hexdigest()

    def _check_not_empty(self) -> None:
        summary = self.summary
        added = summary.already_there or any(summary.documents.values())
        if summary.documents["train"] or (self.index.held_groups and added):
            return
        others = summary.documents["dev"] + summary.documents["test"]
        raise CorpusError(
            f"Expected text to train on, found no training text in {summary.files} files: "
            f"{others} documents in dev and test, {summary.dropped_short} sequences below "
            f"{self.config.min_tokens} tokens, {summary.dropped_without_target} without a target, "
            f"{summary.skipped_undecodable} undecodable, {summary.unlisted} not in the split file. "
            "Name more text, or type a smaller --min-tokens."
        )


def _judged(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _batch(
    documents: Iterator[tuple[Document, str, Split | None]], limit: int | None
) -> Iterator[tuple[Document, str, Split | None]]:
    most = BATCH_DOCUMENTS if limit is None else min(BATCH_DOCUMENTS, limit)
    size = 0
    for item in itertools.islice(documents, most):
        yield item
        size += sum(len(segment.text) for segment in item[0].segments)
        if size >= BATCH_CHARACTERS:
            return
