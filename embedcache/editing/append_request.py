"""What is asked of an append, and what the cache that it is for says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.format.layout import SPLITS, CacheAttributes, ExtractSettings, corpora_of
from embedcache.cache.tokens.tables import SplitTables
from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup.fingerprint import Fingerprint
from embedcache.corpus.dedup.near_duplicates import Held
from embedcache.corpus.summary import Split
from embedcache.errors import UsageError

READING = ("encoding", "undecodable", "min_tokens", "max_tokens_per_document", "split_seed")
FIELDS = ("text_field", "prompt", "completion", "messages_field")


def corpus_like(attributes: CacheAttributes, given: Mapping[str, Any]) -> CorpusConfig:
    """Return the corpus that is ``given``, by settings of `CorpusConfig`, ``sources`` among them.

    What is not given is as for the cache's first corpus: how records become text, how documents are
    cut, and the parts of them that become dev and test. Those are none where dev and test were
    sources of their own, or listed; how much to read of which data set is never taken from there.
    """
    first = CorpusConfig.from_dict(corpora_of(attributes.corpus)[0]["config"])
    names = READING if given.keys() & {*FIELDS} else (*READING, *FIELDS)
    dev, test = (0.0, 0.0) if first.split_file else first.fractions
    inherited = {name: getattr(first, name) for name in names} | {
        "context": attributes.settings.context,
        "dev_fraction": dev,
        "test_fraction": test,
    }
    return CorpusConfig(**{**inherited, **given})


def require_settings(settings: ExtractSettings, asked: Mapping[str, Any], out: Path) -> None:
    """Raise ``UsageError`` where a setting is ``asked`` for that the cache does not have."""
    for name, value in asked.items():
        if (found := getattr(settings, name)) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{out} was extracted with {flag} {_words(found)}, and what is added to it must be "
                f"like it; found {flag} {_words(value)}. Leave {flag} out, or extract into another "
                "--out"
            )


def _words(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else "left out" if value is None else value


class HeldDocuments:
    """The documents of a cache, in the order in which they came; can be gone through again."""

    def __init__(self, tables: Mapping[str, SplitTables]):
        self._tables = tables

    def __iter__(self) -> Iterator[Held]:
        splits: tuple[Split, ...] = ("train", "dev", "test")
        tables = [self._tables[name] for name in splits]
        counts = [len(table.names) for table in tables]
        split_D = np.repeat(np.arange(len(SPLITS)), counts)
        number_D = np.concatenate([np.arange(count) for count in counts])
        for place in np.argsort(np.concatenate([table.index_D for table in tables])).tolist():
            split, number = int(split_D[place]), int(number_D[place])
            table = tables[split]
            yield Held(
                table.names[number],
                splits[split],
                Fingerprint.unpacked(table.fingerprints[number]),
            )
