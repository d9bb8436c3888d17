"""A document's tokens cut to the context."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedcache.corpus.render.tokenise import TokenisedDocument
from embedcache.corpus.sequences import cut

BOS = 9


def tokens(ids: list[int], target: list[bool]) -> TokenisedDocument:
    places = np.arange(len(ids), dtype=np.uint32)
    span = np.stack([places * 3, places * 3 + 3], axis=1)
    return TokenisedDocument(np.asarray(ids, np.uint32), np.asarray(target, bool), span, b"")


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40),
    context=st.integers(2, 12),
    bos=st.sampled_from([None, BOS]),
    limit=st.none() | st.integers(0, 45),
)
def test_sequences_join_to_the_document(
    rows: list[tuple[int, bool]], context: int, bos: int | None, limit: int | None
) -> None:
    ids, target = [row[0] for row in rows], [row[1] for row in rows]
    whole = tokens(ids, target)
    sequences = list(cut(whole, context, bos, limit))
    kept = len(ids) if limit is None else min(limit, len(ids))

    joined: list[int] = []
    place = 0
    for number, sequence in enumerate(sequences):
        assert 1 <= len(sequence.ids) <= context
        assert len(sequence.ids) == context or number == len(sequences) - 1
        assert len(sequence.ids) == len(sequence.loss_mask) == len(sequence.span)
        assert not sequence.loss_mask[0]
        own = sequence.ids.tolist()
        if bos is not None:
            assert own[0] == bos
            if not (number == 0 and ids[0] == bos):  # unless the text begins with it
                assert sequence.span[0].tolist() == [place * 3, place * 3]
                own = own[1:]
        length = len(own)
        expected = target[place : place + length]
        if length == len(sequence.ids):
            expected = [False, *expected[1:]]
        assert sequence.loss_mask[-length:].tolist() == expected
        assert sequence.span[-length:].tolist() == whole.span[place : place + length].tolist()
        joined += own
        place += length
    assert joined == ids[:kept]


def test_cutting_does_not_change_the_document() -> None:
    whole = tokens([1, 2, 3], [True, True, True])
    list(cut(whole, 2))
    assert whole.target.all()
