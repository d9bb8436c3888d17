"""Tokenizers with and without a beginning-of-sequence token, and a writer of corpus files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """The tiny tokenizer, set to start each text with ``<|im_start|>``."""
    made = tiny_tokenizer()
    bos = "<|im_start|>"
    made.bos_token = bos
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.convert_tokens_to_ids(bos))]
    )
    assert made("a").input_ids[0] == made.bos_token_id
    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below ``tmp_path``: text, bytes, or records as JSON lines."""

    def make(name: str, content: str | bytes | list[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make
