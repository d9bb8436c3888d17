"""Read a corpus as token sequences, document by document."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup import (
    CachedDocument,
    DuplicateIndex,
    Fingerprint,
    document_digest,
    minhash,
)
from embedcache.corpus.documents import CorpusSummary, Document, Split
from embedcache.corpus.encoding import UndecodableError, encode
from embedcache.corpus.render.tokenise import TokenisedDocument, Tokeniser
from embedcache.corpus.sequences import Budget, FileParts, Sequence, cut
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.corpus.splits import SplitChooser, SplitFile
from embedcache.errors import CorpusError
from embedcache.store.files import canonical_json

BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1 << 20
"""Documents are tokenised together up to these numbers."""
LOCATIONS = ("sources", "dev_sources", "test_sources", "split_file")
"""Settings that are not part of the corpus's hash, because they only say where files are."""


@dataclass(frozen=True, slots=True)
class DocumentSequences:
    """A document with at least one sequence."""

    index: int
    """0, 1, 2, … in the order of the corpus."""
    name: str
    split: Split
    fingerprint: Fingerprint
    sequences: list[Sequence]


class CorpusReader:
    """Yields the documents of a corpus as sequences; each iteration reads the corpus anew.

    ``summary`` holds the counts of the last iteration, and is up to date during it.

    Args:
        config: what to read, and how.
        tokenizer: a fast tokenizer of transformers.
        cached: the documents of a cache to which the corpus is added. They are skipped, and other
            documents get names and splits as if these had come before.

    Raises:
        CorpusError: a source cannot be read, or no training text is left.
    """

    def __init__(
        self, config: CorpusConfig, tokenizer: Any, cached: Iterable[CachedDocument] = ()
    ) -> None:
        self.config = config
        self.cached = cached
        self.tokeniser = Tokeniser(tokenizer)
        self.summary = CorpusSummary()

    def __iter__(self) -> Iterator[DocumentSequences]:
        self.summary = CorpusSummary()
        index = DuplicateIndex(self.cached)
        try:
            yield from _Pass(self.config, self.tokeniser, self.summary, index).documents()
        finally:
            index.close()


class _Pass:
    """One pass over the corpus."""

    def __init__(
        self,
        config: CorpusConfig,
        tokeniser: Tokeniser,
        summary: CorpusSummary,
        index: DuplicateIndex,
    ) -> None:
        self.config = config
        self.tokeniser = tokeniser
        self.summary = summary
        self.index = index
        self.chooser = SplitChooser(config, index, summary)
        path = config.split_file
        self.split_file = None if path is None else SplitFile(Path(path))
        self.count = 0
        self.parts = FileParts()
        settings = {key: value for key, value in config.to_dict().items() if key not in LOCATIONS}
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
        if self.split_file is not None and not stopped:
            self.split_file.check_complete()
        self._check_not_empty()

    def _list(
        self, sources: tuple[str, ...], given: Split | None, budget: Budget
    ) -> Iterator[DocumentSequences]:
        stream = iterate_documents(sources, self.config, self.tokeniser.tokenizer, self.summary)
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
        """Yield each document with its unique name and its given split."""
        file = ""
        for document in documents:
            split = given
            if self.split_file is not None:
                split = self.split_file.split_of(document)
                if split is None:
                    self.summary.unlisted += 1
                    continue
            if document.part < 2:
                file = self.index.unique_name(document.name)
            yield document, f"{file}#{document.part}" if document.part else file, split

    def _tokens(self, documents: list[Document]) -> list[TokenisedDocument | None]:
        """Return the tokens of each document, or None for one that is not Unicode."""
        if self.config.undecodable == "error":
            return list(self.tokeniser.batch_tokens(documents))
        decodable: list[bool] = []
        for document in documents:
            try:
                encode(document.text, document.label)
            except UndecodableError:
                self.summary.skipped_undecodable += 1
                decodable.append(False)
            else:
                decodable.append(True)
        tokens = iter(self.tokeniser.batch_tokens(list(itertools.compress(documents, decodable))))
        return [next(tokens) if good else None for good in decodable]

    def _sequences(
        self,
        document: Document,
        name: str,
        given: Split | None,
        tokens: TokenisedDocument,
        budget: Budget,
    ) -> DocumentSequences | None:
        """Return a document's sequences, or None if the document is dropped or already cached."""
        limit = self.parts.limit(document, self.config.max_tokens_per_document, len(tokens.ids))
        sequences = cut(tokens, self.config.context, self.tokeniser.bos, limit)
        kept = budget.take(sequence for sequence in sequences if self._keeps(sequence, document))
        if not kept:
            return None
        digest = document_digest(document, tokens.data)
        cached = self.index.cached_split(digest)
        if cached is not None:
            self.summary.already_there += 1
            self.summary.elsewhere += given not in (None, cached)
            self.parts.split = cached
            return None
        split = self.parts.split if document.part > 1 else None
        sketch = None
        if split is None:
            own = document.own_text
            sketch = minhash(tokens.data if own is None else own.encode(errors="surrogatepass"))
            split = self.chooser.choose(sketch, given)
        self.parts.split = split
        self._count(document, name, split, tokens, kept)
        self.count += 1
        return DocumentSequences(self.count - 1, name, split, Fingerprint(digest, sketch), kept)

    def _keeps(self, sequence: Sequence, document: Document) -> bool:
        if document.kind == "text":
            short = len(sequence.ids) < self.config.min_tokens
            self.summary.dropped_short += short
            return not short
        has_target = bool(sequence.loss_mask.any())
        self.summary.dropped_without_target += not has_target
        return has_target

    def _count(
        self,
        document: Document,
        name: str,
        split: Split,
        tokens: TokenisedDocument,
        sequences: list[Sequence],
    ) -> None:
        self.summary.documents[split] += 1
        self.summary.sequences[split] += len(sequences)
        self.summary.tokens[split] += sum(len(sequence.ids) for sequence in sequences)
        self.summary.target_tokens[split] += sum(int(each.loss_mask.sum()) for each in sequences)
        parts = [[len(segment.text), segment.target] for segment in document.segments]
        head = canonical_json([name, split, document.closed, parts, len(tokens.data)])
        self.hash.update(head.encode() + b"\n" + tokens.data)
        self.summary.corpus_sha256 = self.hash.hexdigest()

    def _check_not_empty(self) -> None:
        summary = self.summary
        added = summary.already_there or any(summary.documents.values())
        if summary.documents["train"] or (self.index.cached_groups and added):
            return
        others = summary.documents["dev"] + summary.documents["test"]
        raise CorpusError(
            f"Expected text to train on, found no training text in {summary.files} files: "
            f"{others} documents in dev and test, {summary.dropped_short} sequences below "
            f"{self.config.min_tokens} tokens, {summary.dropped_without_target} without a target, "
            f"{summary.skipped_undecodable} undecodable, {summary.unlisted} not in the split file. "
            "Give more text, or set `min_tokens=` to a smaller number."
        )


def _batch(
    documents: Iterator[tuple[Document, str, Split | None]], limit: int | None
) -> Iterator[tuple[Document, str, Split | None]]:
    """Yield the documents of the next batch, at most ``limit``."""
    count = BATCH_DOCUMENTS if limit is None else min(BATCH_DOCUMENTS, limit)
    size = 0
    for item in itertools.islice(documents, count):
        yield item
        size += sum(len(segment.text) for segment in item[0].segments)
        if size >= BATCH_CHARACTERS:
            return
