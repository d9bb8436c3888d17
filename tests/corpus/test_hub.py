"""Saved and local data sets; no test needs a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.errors import CorpusError

datasets = pytest.importorskip("datasets")
TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(source: str, **settings: Any) -> list[tuple[str, str]]:
    config = CorpusConfig(sources=(source,), **settings)
    return [(d.label, d.text) for d in iterate_documents([source], config)]


EXPECTED = [("saved:1", "one"), ("saved:2", "two"), ("saved:3", "three")]


@pytest.mark.parametrize("scheme", ["", "hf:"])
def test_a_saved_data_set(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    assert read(f"{scheme}{path}") == EXPECTED


def test_a_saved_data_set_of_several_splits(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["unused"]}),
            "extra": datasets.Dataset.from_dict({"text": TEXTS}),
        }
    )
    saved.save_to_disk(path)
    assert read(str(path), dataset_split="extra") == EXPECTED
    with pytest.raises(CorpusError, match=r"the split 'extr', found train, extra.*Did you mean"):
        read(str(path), dataset_split="extr")


def test_a_local_folder_of_data_files(write: Any, tmp_path: Path) -> None:
    write("data/train.jsonl", [{"text": text} for text in TEXTS])
    expected = [(f"data:{number}", text) for number, text in enumerate(TEXTS, 1)]
    assert read(f"hf:{tmp_path / 'data'}") == expected


def test_a_missing_data_set(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(CorpusError, match=r"hf:.*expected a data set with the split 'train'"):
        read(f"hf:{tmp_path / 'none'}")
    with pytest.raises(CorpusError, match="hf:org/name"):
        read("hf:")


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'embedcache\[data\]'"):
        read("hf:org/name")
