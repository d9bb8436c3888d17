"""What a document is known again by is kept whole, and tells of nothing but what it is."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.cache.format.layout import FINGERPRINT_BYTES
from embedcache.corpus.dedup.fingerprint import PACKED_BYTES, Fingerprint, Sketch, digest
from embedcache.corpus.dedup.near_duplicates import DuplicateIndex, Held
from embedcache.corpus.documents import Document, Segment


def test_a_cache_keeps_all_of_it() -> None:
    assert PACKED_BYTES == FINGERPRINT_BYTES


@given(data=st.binary(max_size=300), own=st.booleans())
def test_it_is_kept_whole(data: bytes, own: bool) -> None:
    document = Document("a", (Segment("a", target=True),))
    made = Fingerprint(digest(document, data), Sketch.of(data) if own else None)
    row = made.packed()
    assert (row.dtype, row.shape) == (np.uint8, (PACKED_BYTES,))
    assert Fingerprint.unpacked(row) == made


def document(*segments: tuple[str, bool], name: str = "a", closed: bool = True) -> Document:
    return Document(name, tuple(Segment(*segment) for segment in segments), closed)


def test_a_digest_is_of_text_and_targets_whatever_the_name() -> None:
    same = document(("one two", True))
    others = [
        document(("one twO", True)),
        document(("one two", False)),
        document(("one ", False), ("two", True)),
        document(("one ", True), ("two", True)),
        document(("one two", True), closed=False),
    ]
    found = [digest(each, each.text.encode()) for each in (same, *others)]
    assert len(set(found)) == len(found)
    renamed = document(("one two", True), name="b")
    assert digest(renamed, renamed.text.encode()) == found[0]


def held(name: str, split: str, data: bytes, own: bool = True) -> Held:
    known = digest(document((name, True)), data)
    return Held(name, split, Fingerprint(known, Sketch.of(data) if own else None))  # type: ignore[arg-type]


def test_an_index_begins_with_what_is_held() -> None:
    draw = random.Random(0)
    texts = [draw.randbytes(2000) for _ in range(4)]
    index = DuplicateIndex(
        [
            held("a", "train", texts[0]),
            held("b", "test", texts[1]),
            held("a@2", "train", texts[0][:1950]),
            held("big#1", "dev", texts[2]),
            held("big#2", "dev", texts[3], own=False),
            held("no piece#7", "dev", texts[3], own=False),
        ]
    )
    assert index.held_groups == 3
    free = {"a": "a@3", "c": "c", "big": "big@2", "no piece#7": "no piece#7@2"}
    assert {name: index.unique_name(name) for name in free} == free
    assert index.held_in(held("b", "test", texts[1]).fingerprint.digest) == "test"
    assert index.held_in(held("b", "test", texts[2]).fingerprint.digest) is None
    for text, split in zip(texts, (["train"], ["test"], ["dev"], []), strict=True):
        assert [match.split for match in index.find(Sketch.of(text[:1900])).matches] == split
    index.close()


@pytest.mark.parametrize("length", [1, 12, 20])
def test_short_documents_are_not_taken_for_each_other(length: int) -> None:
    """Few stretches fill few bins, whose low bytes alone say little."""
    draw = random.Random(length)
    texts = {draw.randbytes(length) for _ in range(400)}
    index = DuplicateIndex(held(f"{n}", "train", text) for n, text in enumerate(texts))
    assert index.held_groups == len(texts)
    index.close()
