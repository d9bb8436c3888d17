"""The likeliest tokens, and the chunks they are looked for in."""

from __future__ import annotations

import pytest
import torch
from loss_problems import problem, reference_logits

from embedcache.loss import likeliest, row_chunks, topk


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (10, 3), (9, 3), (2, 100)])
def test_row_chunks_cover_every_row_once(rows, size, monkeypatch):
    monkeypatch.setitem(topk.CHUNK_BYTES, "cpu", size * 4 * 7)
    chunks = row_chunks(rows, 7, torch.device("cpu"))
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    assert all(chunk.stop - chunk.start <= size for chunk in chunks)


def test_likeliest_are_the_largest_logits(monkeypatch):
    monkeypatch.setitem(topk.CHUNK_BYTES, "cpu", 3 * 4 * 101)
    x, head, _ = problem("all", 64, 101, 16)
    found = likeliest(x.detach(), head, 5)
    expected = reference_logits(x.detach(), head).topk(5).indices
    assert torch.equal(found.sort(dim=1).values, expected.sort(dim=1).values)
