"""What a caller of `extract` asks for, from configurations or from keywords."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from embedcache.base.identity import BaseIdentity
from embedcache.base.load import Base, load_base, load_identity, load_tokenizer
from embedcache.base.taps import check_taps, parse_taps
from embedcache.cache.format.layout import ExtractSettings
from embedcache.corpus.config import CorpusConfig
from embedcache.device import resolve_device
from embedcache.errors import UsageError
from embedcache.progress import Progress

Corpus = CorpusConfig | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A configuration, or one or more sources: files, folders, globs, ``hf:org/name``, ``stdlib:``."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of a forward pass: a CPU is fastest while activations stay near its caches."""

_CORPUS = {field.name for field in fields(CorpusConfig)} - {"sources"}
_SETTINGS = {field.name for field in fields(ExtractSettings)}


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
    for name in keywords:
        if name not in _CORPUS | _SETTINGS:
            known = sorted(_CORPUS | _SETTINGS)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{near[0]}=`?" if near else f"Known are: {', '.join(known)}."
            raise UsageError(f"unknown setting `{name}=`. {hint}")
    of_corpus = {name: value for name, value in keywords.items() if name in _CORPUS}
    of_settings = {name: value for name, value in keywords.items() if name in _SETTINGS}
    if isinstance(corpus, CorpusConfig):
        _refuse(of_corpus, "a CorpusConfig")
    elif corpus is not None:
        if settings is not None:
            of_corpus.setdefault("context", settings.context)
        for name in ("dev_sources", "test_sources"):
            if name in of_corpus:
                of_corpus[name] = _sources(of_corpus[name])
        if isinstance(of_corpus.get("split_file"), os.PathLike):
            of_corpus["split_file"] = os.fspath(of_corpus["split_file"])
        corpus = CorpusConfig(sources=_sources(corpus), **of_corpus)
    elif keywords:
        name = next(iter(keywords))
        raise UsageError(
            "without a corpus all settings are those of the cache at `out=`, expected none, found "
            f"`{name}=`: leave it out, or name the corpus"
        )
    if settings is not None:
        _refuse(of_settings, "`settings=`")
    elif corpus is not None:
        of_settings["context"] = corpus.context
        if isinstance(taps := of_settings.get("taps", ()), str):
            of_settings["taps"] = parse_taps(taps)
        elif taps:
            of_settings["taps"] = tuple(taps)
        if of_settings.get("batch_tokens") is None:
            of_settings["batch_tokens"] = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        settings = ExtractSettings(**of_settings)
    if corpus is not None and settings is not None and corpus.context != settings.context:
        raise UsageError(
            f"expected one `context=` in the corpus and in `settings=`, found {corpus.context} and "
            f"{settings.context}"
        )
    return corpus, settings


def _refuse(keywords: Mapping[str, Any], given: str) -> None:
    """Raise ``UsageError`` if keywords repeat what an object holds."""
    for name in keywords:
        raise UsageError(
            f"expected {given} or the keyword `{name}=`, found both: set {name} in {given}"
        )


def _sources(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),)
    return tuple(map(os.fspath, value))
