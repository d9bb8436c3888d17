"""What a caller of `extract` asks for, from configurations or from keywords."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embedcache.base.identity import BaseIdentity
from embedcache.base.load import Base, load_base, load_identity, load_tokenizer
from embedcache.base.taps import check_taps, parse_taps
from embedcache.cache.format.layout import ExtractSettings
from embedcache.config import split_settings
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device
from embedcache.errors import UsageError
from embedcache.progress import Progress

Corpus = CorpusConfig | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A configuration, or one or more sources: files, folders, globs, ``hf:org/name``, ``stdlib:``."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of a forward pass: a CPU is fastest while activations stay near its caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of `extract`, checked.

    ``corpus`` and ``settings`` are None where those of the cache at ``out`` are to be used.
    """

    corpus: CorpusConfig | None
    settings: ExtractSettings | None
    base: str
    out: Path
    revision: str | None
    device: torch.device
    dtype: str
    max_quarantined: float
    progress: Progress

    @classmethod
    def of(
        cls,
        corpus: Corpus | None,
        settings: ExtractSettings | None,
        keywords: Mapping[str, Any],
        *,
        base: str | os.PathLike[str],
        out: str | os.PathLike[str],
        revision: str | None,
        device: str,
        dtype: str,
        max_quarantined: float,
        progress: Progress,
    ) -> Request:
        """Return the request of a call; raises ``UsageError`` for arguments that do not agree."""
        target = resolve_device(device)
        corpus, settings = configurations(corpus, settings, keywords, target)
        return cls(
            corpus=corpus,
            settings=settings,
            base=os.fspath(base),
            out=Path(out),
            revision=revision,
            device=target,
            dtype=dtype,
            max_quarantined=max_quarantined,
            progress=progress,
        )

    def identity(self) -> BaseIdentity:
        """Return the identity of the base, which must have the taps asked for."""
        identity = load_identity(self.base, revision=self.revision)
        if self.settings is not None:
            check_taps(self.settings.taps, identity.num_layers)
        return identity

    def tokenizer(self) -> Any:
        """Return the tokenizer of the base."""
        return load_tokenizer(self.base, revision=self.revision)

    def load_base(self, dtype: str) -> Base:
        """Load the base."""
        with self.progress.bar("loading the base", None, ""):
            return load_base(
                self.base, revision=self.revision, device=str(self.device), dtype=dtype
            )


def configurations(
    corpus: Corpus | None,
    settings: ExtractSettings | None,
    keywords: Mapping[str, Any],
    device: torch.device,
) -> tuple[CorpusConfig | None, ExtractSettings | None]:
    """Return the configurations of a corpus and an extraction from objects and keywords.

    A keyword is a field of `CorpusConfig` or of `ExtractSettings`; ``context`` is one of both. An
    object and a keyword of its class cannot be given together. Without a corpus, keywords or
    settings, both results are None.

    >>> corpus, settings = configurations(
    ...     "docs", None, {"context": 512, "codec": "int8"}, torch.device("cpu")
    ... )
    >>> corpus.sources, corpus.context, settings.context, settings.codec
    (('docs',), 512, 512, 'int8')
    """
    of_corpus, of_settings = split_settings(keywords, CorpusConfig, ExtractSettings)
    if corpus is None and keywords:
        raise UsageError(
            "without a corpus all settings are those of the cache at `out=`, expected none, found "
            f"`{next(iter(keywords))}=`: leave it out, or name the corpus"
        )
    if isinstance(corpus, CorpusConfig):
        _refuse(of_corpus, "a CorpusConfig")
    elif corpus is not None:
        if settings is not None:
            of_corpus.setdefault("context", settings.context)
        if isinstance(split_file := of_corpus.get("split_file"), os.PathLike):
            of_corpus["split_file"] = os.fspath(split_file)
        corpus = CorpusConfig.from_dict({"sources": corpus} | of_corpus)
    if settings is not None:
        _refuse(of_settings, "`settings=`")
        if corpus is not None and corpus.context != settings.context:
            raise UsageError(
                "expected one `context=` for the corpus and in `settings=`, found "
                f"{corpus.context} and {settings.context}"
            )
    elif corpus is not None:
        of_settings["context"] = corpus.context
        if isinstance(taps := of_settings.get("taps"), str):
            of_settings["taps"] = parse_taps(taps)
        if of_settings.get("batch_tokens") is None:
            of_settings["batch_tokens"] = BATCH_TOKENS[device.type]
        settings = ExtractSettings(**of_settings)
    return corpus, settings


def _refuse(keywords: Mapping[str, Any], given: str) -> None:
    """Raise ``UsageError`` if keywords repeat what an object holds."""
    for name in keywords:
        raise UsageError(
            f"expected {given} or the keyword `{name}=`, found both: set {name} in {given}"
        )
