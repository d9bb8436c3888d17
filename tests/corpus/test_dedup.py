"""Fingerprints and the duplicate index, compared with the exact Jaccard similarity."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.cache.format import layout
from embedcache.corpus.dedup import (
    FINGERPRINT_BYTES,
    SKETCHED_BYTES,
    CachedDocument,
    DuplicateIndex,
    Fingerprint,
    document_digest,
    minhash,
    similarity,
)
from embedcache.corpus.documents import Document, Segment, Split


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def jaccard(a: bytes, b: bytes) -> float:
    """Return the exact Jaccard similarity of the sets of 16-byte substrings."""
    one, two = ({data[i : i + 16] for i in range(len(data) - 15)} for data in (a, b))
    return len(one & two) / len(one | two)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(600, 5000), changed=st.floats(0, 1))
def test_sketches_estimate_the_jaccard_similarity(seed: int, length: int, changed: float) -> None:
    a = noise(seed, length)
    cut = int(length * changed)
    b = noise(seed + 1, cut) + a[cut:]
    # The standard deviation of 128 bins is at most 0.045; allow five of them.
    assert similarity(minhash(a), minhash(b)) == pytest.approx(jaccard(a, b), abs=0.225)


def test_the_estimate_is_unbiased_for_short_documents() -> None:
    errors = []
    for seed in range(300):
        data = noise(seed, 40 + seed % 40)
        edited = data[:-8] + noise(seed + 1000, 12)
        errors.append(similarity(minhash(data), minhash(edited)) - jaccard(data, edited))
    assert np.mean(errors) == pytest.approx(0, abs=5 * np.std(errors) / 300**0.5)
    assert np.std(errors) < 0.1


@settings(deadline=None)
@given(data=st.binary(max_size=80), other=st.binary(max_size=15))
def test_documents_below_a_shingle_are_similar_only_to_equal_ones(
    data: bytes, other: bytes
) -> None:
    assert minhash(data) == minhash(bytes(data))
    if data != other:
        assert similarity(minhash(data), minhash(other)) < 0.1


def test_a_sketch_is_the_same_in_every_version() -> None:
    """Caches store sketches, and documents that are appended later are compared with them."""
    assert minhash(b"The quick brown fox jumps over the lazy dog.")[:8].hex() == "0ef82a6c8ff34444"


def test_only_the_start_of_a_document_is_sketched() -> None:
    start = noise(2, SKETCHED_BYTES)
    assert minhash(start + noise(3, 10**6)) == minhash(start)


def document(*segments: tuple[str, bool], name: str = "a", closed: bool = True) -> Document:
    return Document(name, tuple(Segment(*segment) for segment in segments), closed)


def test_a_digest_depends_on_text_and_targets_but_not_on_the_name() -> None:
    first = document(("one two", True))
    others = [
        document(("one twO", True)),
        document(("one two", False)),
        document(("one ", False), ("two", True)),
        document(("one ", True), ("two", True)),
        document(("one two", True), closed=False),
    ]
    found = [document_digest(each, each.text.encode()) for each in (first, *others)]
    assert len(set(found)) == len(found)
    renamed = document(("one two", True), name="b")
    assert document_digest(renamed, renamed.text.encode()) == found[0]


@given(data=st.binary(max_size=300), with_sketch=st.booleans())
def test_a_packed_fingerprint_is_unpacked(data: bytes, with_sketch: bool) -> None:
    digest = document_digest(document(("a", True)), data)
    fingerprint = Fingerprint(digest, minhash(data) if with_sketch else None)
    row = fingerprint.packed()
    assert (row.dtype, row.shape) == (np.uint8, (FINGERPRINT_BYTES,))
    assert Fingerprint.unpacked(row) == fingerprint
    assert layout.FINGERPRINT_BYTES == FINGERPRINT_BYTES


def test_edited_copies_are_near_duplicates() -> None:
    index = DuplicateIndex()
    originals = [noise(seed, 3000) for seed in range(100)]
    for data in originals:
        assert index.find(minhash(data)) == []
        assert index.add(minhash(data), [], "train") == 1
    found = 0
    for data in originals:
        edited = data[:1500] + b" an edit " + data[1500:2900]
        assert jaccard(data, edited) > 0.9
        found += len(index.find(minhash(edited))) == 1
    assert found >= 98
    index.close()


def test_documents_that_share_a_template_are_not_near_duplicates() -> None:
    index = DuplicateIndex()
    template = noise(0, 1000)
    for seed in range(1, 300):
        sketch = minhash(template + noise(seed, 1000))
        assert index.find(sketch) == []
        index.add(sketch, [], "train")
    index.close()


def test_the_oldest_group_comes_first() -> None:
    index = DuplicateIndex()
    a = noise(1, 2000)
    b = a[:1900] + noise(2, 100)
    assert index.add(minhash(a), [], "train") == 1
    assert index.add(minhash(b), [], "test") == 1
    groups = index.find(minhash(b))
    assert [group.split for group in groups] == ["train", "test"]
    assert index.add(minhash(b), groups, "train") == 2
    index.close()


def test_unique_names() -> None:
    index = DuplicateIndex()
    given = ["a", "b", "a", "a@2", "a"]
    assert [index.unique_name(name) for name in given] == ["a", "b", "a@2", "a@2@2", "a@3"]
    index.close()


def cached(name: str, split: Split, data: bytes, with_sketch: bool = True) -> CachedDocument:
    digest = document_digest(document((name, True)), data)
    return CachedDocument(name, split, Fingerprint(digest, minhash(data) if with_sketch else None))


def test_an_index_starts_with_the_documents_of_a_cache() -> None:
    texts = [noise(seed, 2000) for seed in range(4)]
    index = DuplicateIndex(
        [
            cached("a", "train", texts[0]),
            cached("b", "test", texts[1]),
            cached("a@2", "train", texts[0][:1950]),
            cached("big#1", "dev", texts[2]),
            cached("big#2", "dev", texts[3], with_sketch=False),
            cached("no part#7", "dev", texts[3], with_sketch=False),
        ]
    )
    assert index.cached_groups == 3
    free = {"a": "a@3", "c": "c", "big": "big@2", "no part#7": "no part#7@2"}
    assert {name: index.unique_name(name) for name in free} == free
    assert index.cached_split(cached("b", "test", texts[1]).fingerprint.digest) == "test"
    assert index.cached_split(cached("b", "test", texts[2]).fingerprint.digest) is None
    for text, split in zip(texts, (["train"], ["test"], ["dev"], []), strict=True):
        assert [group.split for group in index.find(minhash(text[:1900]))] == split
    index.close()


@pytest.mark.parametrize("length", [1, 12, 20])
def test_short_documents_are_told_apart(length: int) -> None:
    """Few substrings fill few bins, so that most bytes of the sketch come from one value."""
    draw = random.Random(length)
    texts = {draw.randbytes(length) for _ in range(400)}
    index = DuplicateIndex(cached(f"{n}", "train", text) for n, text in enumerate(texts))
    assert index.cached_groups == len(texts)
    index.close()
