from __future__ import annotations

import json
from typing import Any

import pytest

from embedcache.corpus.config import CorpusConfig
from embedcache.errors import UsageError


def test_settings_survive_json() -> None:
    config = CorpusConfig(
        sources=("a", "b"), test_sources=("t",), prompt="Q: {q}", completion="{a}", context=64
    )
    assert CorpusConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"`contxt=`.*Did you mean 'context'"):
        CorpusConfig.from_dict({"sources": ["a"], "contxt": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "expected at least one"),
        ({"sources": 3}, "valid tuple"),
        ({"split_file": "s.json", "dev_sources": ("d",)}, "found both"),
        ({"dev_fraction": 1.0}, "dev_fraction"),
        ({"test_fraction": -0.1}, "test_fraction"),
        ({"dev_fraction": 0.5, "test_fraction": 0.5}, "left to train on"),
        ({"split_seed": 1.5}, "split_seed"),
        ({"prompt": "{q}"}, "add `completion=`"),
        ({"completion": "{q}"}, "add `prompt=`"),
        ({"prompt": "{q", "completion": "{a}"}, "prompt template"),
        ({"prompt": "{q!r}", "completion": "{a}"}, "plain fields"),
        ({"prompt": "{}", "completion": "{a}"}, "plain fields"),
        ({"prompt": "{q}", "completion": "yes"}, "name a field"),
        ({"text_field": "a", "messages_field": "b"}, "text_field or messages_field"),
        ({"undecodable": "skipp"}, "Did you mean 'skip'"),
        ({"encoding": "utf-9"}, "latin-1"),
        ({"encoding": "hex"}, "latin-1"),
        ({"context": 1}, "greater than or equal to 2"),
        ({"context": 8}, "try 8"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"limit_documents": 0}, "limit_documents"),
        ({"max_tokens_per_document": True}, "max_tokens_per_document"),
    ],
)
def test_contradictions_are_usage_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CorpusConfig(**{"sources": ("a",), **settings})


def test_a_split_with_its_own_sources_takes_none_of_the_others() -> None:
    assert CorpusConfig(sources=("a",)).fractions == (0.05, 0.1)
    assert CorpusConfig(sources=("a",), test_sources=("t",)).fractions == (0.05, 0.0)
    assert CorpusConfig(sources=("a",), dev_sources=("d",)).fractions == (0.0, 0.1)
