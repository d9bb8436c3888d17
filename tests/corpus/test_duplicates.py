"""Near-duplicates, compared with the exact similarity of the sets of stretches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.corpus.dedup.fingerprint import JUDGED_BYTES, Sketch, signature
from embedcache.corpus.dedup.near_duplicates import DuplicateIndex


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def similarity(a: bytes, b: bytes) -> float:
    """Return the exact Jaccard similarity of the sets of 16-byte stretches."""
    one, two = ({data[i : i + 16] for i in range(len(data) - 15)} for data in (a, b))
    return len(one & two) / len(one | two)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(600, 5000),
    changed=st.floats(0, 1),
)
def test_equal_bins_estimate_the_similarity(seed: int, length: int, changed: float) -> None:
    a = noise(seed, length)
    cut = int(length * changed)
    b = noise(seed + 1, cut) + a[cut:]
    estimate = float(np.mean(signature(a) == signature(b)))
    # 128 bins: a standard deviation of at most 0.045; five of them.
    assert estimate == pytest.approx(similarity(a, b), abs=0.225)


@settings(deadline=None)
@given(data=st.binary(max_size=80), other=st.binary(max_size=15))
def test_short_data_is_like_its_equal_only(data: bytes, other: bytes) -> None:
    assert (signature(data) == signature(bytes(data))).all()
    if data != other:
        assert np.mean(signature(data) == signature(other)) < 0.1


def test_the_estimate_is_unbiased_for_few_stretches() -> None:
    errors = []
    for seed in range(300):
        data = noise(seed, 40 + seed % 40)
        edited = data[:-8] + noise(seed + 1000, 12)
        estimate = np.mean(signature(data) == signature(edited))
        errors.append(float(estimate) - similarity(data, edited))
    assert np.mean(errors) == pytest.approx(0, abs=5 * np.std(errors) / 300**0.5)
    assert np.std(errors) < 0.1


def test_blocks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(1, 5000)
    whole = signature(data)
    monkeypatch.setattr("embedcache.corpus.dedup.fingerprint.BLOCK", 333)
    assert (signature(data) == whole).all()


def test_only_the_start_is_judged() -> None:
    start = noise(2, JUDGED_BYTES)
    assert (signature(start + noise(3, 10**6)) == signature(start)).all()


def test_groups_of_edited_copies() -> None:
    index = DuplicateIndex()
    originals = [noise(seed, 3000) for seed in range(100)]
    for data in originals:
        lookup = index.find(Sketch.of(data))
        assert not lookup.matches
        assert index.store(lookup, "train") == 1
    found = 0
    for data in originals:
        edited = data[:1500] + b" an edit " + data[1500:2900]
        assert similarity(data, edited) > 0.9
        found += len(index.find(Sketch.of(edited)).matches) == 1
    assert found >= 98
    index.close()


def test_a_shared_template_does_not_join_unlike_documents() -> None:
    index = DuplicateIndex()
    template = noise(0, 1000)
    for seed in range(1, 300):
        lookup = index.find(Sketch.of(template + noise(seed, 1000)))
        assert not lookup.matches
        index.store(lookup, "train")
    index.close()


def test_the_oldest_group_comes_first() -> None:
    index = DuplicateIndex()
    a = noise(1, 2000)
    b = a[:1900] + noise(2, 100)
    lookups = [
        index.find(Sketch.of(data)) for data in (a, b)
    ]  # before either is stored: two groups
    for lookup, split in zip(lookups, ("train", "test"), strict=True):
        assert index.store(lookup, split) == 1
    found = index.find(Sketch.of(b))
    assert [match.split for match in found.matches] == ["train", "test"]
    assert index.store(found, "train") == 2
    index.close()


def test_unique_names() -> None:
    index = DuplicateIndex()
    given = ["a", "b", "a", "a@2", "a"]
    assert [index.unique_name(name) for name in given] == ["a", "b", "a@2", "a@2@2", "a@3"]
    index.close()
