"""Configurations from keywords, and paths of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures_extract import comparable_tree, corpus_config, small_settings, write_documents
from support.tiny import tiny_base_directory

from embedcache.cache.format.layout import ExtractSettings
from embedcache.corpus.config import CorpusConfig
from embedcache.errors import UsageError
from embedcache.extraction.extract import extract
from embedcache.extraction.request import configurations

CPU = torch.device("cpu")
DOCS = CorpusConfig(sources=("docs",), context=64)


def test_keywords_go_to_the_configuration_that_has_the_field() -> None:
    corpus, settings = configurations(
        [Path("a"), "b"],
        None,
        {"context": 512, "dev_fraction": 0.1, "dev_sources": Path("d"), "taps": "layer_1,final"},
        CPU,
    )
    assert corpus == CorpusConfig(
        sources=("a", "b"), context=512, dev_fraction=0.1, dev_sources=("d",)
    )
    assert settings == ExtractSettings(taps=("layer_1", "final"), context=512)


def test_a_gpu_takes_larger_batches_unless_told() -> None:
    for keywords, expected in (({}, 16384), ({"batch_tokens": 64}, 64)):
        _, settings = configurations("docs", None, keywords, torch.device("cuda"))
        assert settings is not None
        assert settings.batch_tokens == expected


def test_a_context_follows_from_either_object() -> None:
    assert configurations(DOCS, None, {}, CPU)[1] == ExtractSettings(context=64)
    assert configurations("docs", ExtractSettings(context=64), {}, CPU)[0] == DOCS
    assert configurations(None, None, {}, CPU) == (None, None)


@pytest.mark.parametrize(
    ("corpus", "settings", "keywords", "message"),
    [
        (
            "docs",
            None,
            {"contxt": 5},
            r"`contxt=` is no setting of .*Did you mean 'context'",
        ),
        (DOCS, None, {"context": 5}, "a CorpusConfig or the keyword `context=`, found both"),
        ("docs", ExtractSettings(), {"bits": 2.0}, "`settings=` or the keyword `bits=`"),
        (DOCS, ExtractSettings(), {}, r"expected one `context=`.*found 64 and 1024"),
        (None, None, {"codec": "int8"}, r"without a corpus .* found `codec=`"),
    ],
)
def test_arguments_that_do_not_agree_are_refused(
    corpus: Any, settings: Any, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        configurations(corpus, settings, keywords, CPU)


def test_strings_and_keywords_give_the_cache_of_paths_and_objects(tmp_path: Path) -> None:
    base = tiny_base_directory(tmp_path / "base")
    corpus = write_documents(tmp_path / "corpus", 5)
    extract(
        corpus_config(corpus),
        base=base,
        out=tmp_path / "a",
        settings=small_settings(),
        device="cpu",
    )
    extract(
        str(corpus),
        base=str(base),
        out=str(tmp_path / "b"),
        device="cpu",
        context=64,
        dev_fraction=0.2,
        test_fraction=0.2,
        block_tokens=256,
        batch_tokens=256,
    )
    assert comparable_tree(tmp_path / "a") == comparable_tree(tmp_path / "b")
    assert extract(None, base=base, out=tmp_path / "a", device="cpu").computed_blocks == 0
    with pytest.raises(UsageError, match="expected a corpus to extract, found none"):
        extract(None, base=base, out=tmp_path / "c", device="cpu")
    assert not (tmp_path / "c").exists()
