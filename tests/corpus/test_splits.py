"""The assignment of documents to train, dev and test."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.dedup import DuplicateIndex, minhash
from embedcache.corpus.documents import CorpusSummary, Document, Segment
from embedcache.corpus.splits import SplitChooser, SplitFile
from embedcache.errors import CorpusError


def splits(data: list[bytes], **settings: Any) -> tuple[list[str], CorpusSummary]:
    summary = CorpusSummary()
    index = DuplicateIndex()
    chooser = SplitChooser(CorpusConfig(sources=("a",), **settings), index, summary)
    found = [chooser.choose(minhash(item), None) for item in data]
    index.close()
    return [str(split) for split in found], summary


def texts(count: int, seed: int = 0) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(60) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 200),
    dev=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    seed=st.integers(),
)
def test_fractions_hold_at_any_number_of_documents(
    count: int, dev: float, test: float, seed: int
) -> None:
    found, _ = splits(texts(count), dev_fraction=dev, test_fraction=test, split_seed=seed)
    counts = Counter(found)
    # The discrepancy of multiples of the golden ratio, and the three first groups.
    tolerance = 3 + 5
    assert counts["dev"] == pytest.approx(dev * count, abs=tolerance)
    assert counts["test"] == pytest.approx(test * count, abs=tolerance)
    assert splits(texts(count), dev_fraction=dev, test_fraction=test, split_seed=seed)[0] == found


def test_the_first_groups_leave_no_split_empty() -> None:
    assert splits(texts(3))[0] == ["train", "dev", "test"]
    assert splits(texts(2), dev_fraction=0.0)[0] == ["train", "test"]
    assert set(splits(texts(50), dev_fraction=0.0, test_fraction=0.0)[0]) == {"train"}


def test_the_split_is_the_same_on_every_machine() -> None:
    found = splits(texts(200))[0]
    assert Counter(found) == {"train": 169, "dev": 11, "test": 20}
    assert [place for place, split in enumerate(found) if split == "dev"][:5] == [1, 9, 30, 43, 64]


def test_another_seed_gives_another_split() -> None:
    assert splits(texts(200))[0] != splits(texts(200), split_seed=1)[0]


def test_near_duplicates_are_in_one_split() -> None:
    originals = [random.Random(seed).randbytes(2000) for seed in range(100)]
    edited = [data[:1900] + b"edited" for data in originals]
    found, summary = splits(originals + edited)
    assert found[:100] == found[100:]
    assert summary.near_duplicate_groups == 100
    assert summary.largest_near_duplicate_group == 2
    assert summary.near_duplicates_across_splits == 0


def test_near_duplicates_across_given_splits_are_counted() -> None:
    summary = CorpusSummary()
    index = DuplicateIndex()
    chooser = SplitChooser(CorpusConfig(sources=("a",)), index, summary)
    data = minhash(random.Random(1).randbytes(2000))
    assert chooser.choose(data, "train") == "train"
    assert chooser.choose(data, "test") == "test"
    assert chooser.choose(data, None) == "train"
    assert summary.near_duplicates_across_splits == 2
    assert summary.near_duplicate_groups == 1
    index.close()


def named(name: str, part: int = 0) -> Document:
    return Document(name, (Segment("text", target=True),), part=part)


def listed(write: Any, value: object) -> SplitFile:
    return SplitFile(Path(write("split.json", json.dumps(value))))


def test_a_split_file(write: Any) -> None:
    names = listed(write, {"train": ["a", "big"], "test": ["b#2"]})
    assert names.split_of(named("a")) == "train"
    assert names.split_of(named("big", part=3)) == "train"
    assert names.split_of(named("b", part=2)) == "test"
    assert names.split_of(named("b", part=1)) is None
    names.check_complete()


def test_a_split_file_with_a_missing_document(write: Any) -> None:
    names = listed(write, {"train": ["a", "gone.py"]})
    names.split_of(named("a"))
    with pytest.raises(CorpusError, match=r"expected 2 documents.*gone\.py"):
        names.check_complete()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": ["a"], "tset": ["b"]}, "'tset'.*Did you mean 'test'"),
        ({"train": ["a"], "dev": ["a"]}, "'a' in train and dev"),
        ({"train": "a"}, "another shape"),
        (["a"], "another shape"),
    ],
)
def test_malformed_split_files_are_refused(write: Any, value: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        listed(write, value)


def test_unreadable_split_files_are_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nothing there"):
        SplitFile(tmp_path / "none.json")
    with pytest.raises(CorpusError, match="in JSON"):
        SplitFile(write("split.json", "{"))
