"""Tokens and tables are read as they were written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fixtures_extract import corpus_config

from embedcache.base.load import load_tokenizer
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import FINGERPRINT_BYTES
from embedcache.cache.tokens import reader as tokens_module
from embedcache.cache.tokens import tables
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.writer import SplitTokensWriter
from embedcache.corpus.reader import CorpusReader
from embedcache.errors import UsageError

BLOCK = 16


def made(length: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.arange(first, first + length, dtype=np.uint32)
    return ids, ids % 3 > 0, np.stack([ids * 2, ids * 2 + 2], axis=1).astype(np.uint32)


def fingerprint(number: int) -> np.ndarray:
    return np.full(FINGERPRINT_BYTES, number + 1, np.uint8)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, BLOCK), min_size=1, max_size=4), max_size=8))
def test_tokens_read_back_and_no_block_splits_a_sequence(lengths: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (tables, tokens_module):
            patch.setattr(module, "TABLE_CHUNK", 3)  # tables of several chunks
        writer = SplitTokensWriter(zarr.create_group(Path(folder) / "train", zarr_format=3), BLOCK)
        expected, count = [], 1
        for number, document in enumerate(lengths):
            sequences = []
            for length in document:
                sequences.append(made(length, count))
                count += length
            writer.append_document(10 + number, f"naïve/{number}", fingerprint(number), sequences)
            expected += [(number, *sequence) for sequence in sequences]
        writer.close()
        tokens = SplitTokens(Path(folder), "train", BLOCK)
        spans = tokens.table("tokens/span")
        found = []
        for block in range(tokens.blocks):
            ids_N, loss_mask_N = tokens.used(block)
            rows_S2 = tokens.offsets(block)
            assert rows_S2[0, 0] == 0
            assert rows_S2[-1, 1] == tokens.block_rows(block) == len(ids_N) <= BLOCK
            assert (rows_S2[1:, 0] == rows_S2[:-1, 1]).all()  # no gap, no overlap
            for document, (a, b) in zip(tokens.documents(block), rows_S2.tolist(), strict=True):
                rows = slice(block * BLOCK + a, block * BLOCK + b)
                found.append((document, ids_N[a:b], loss_mask_N[a:b], spans[rows]))
        assert len(found) == len(expected) == tokens.totals["sequences"]
        for got, wanted in zip(found, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert tokens.totals["tokens"] == count - 1
        assert tokens.totals["documents"] == len(lengths)
        for number, row in enumerate(tokens.table("documents/fingerprint")):
            assert np.array_equal(row, fingerprint(number))
        assert tokens.table("documents/index").tolist() == [10 + n for n in range(len(lengths))]


def test_a_sequence_longer_than_a_block_is_refused(tmp_path: Path) -> None:
    writer = SplitTokensWriter(zarr.create_group(tmp_path / "train", zarr_format=3), BLOCK)
    with pytest.raises(UsageError, match=r"`block_tokens=` expects .* 17; found 16"):
        writer.append_document(0, "a", fingerprint(0), [made(BLOCK + 1, 1)])


def test_a_finished_cache_holds_what_the_corpus_reader_yields(
    caches: dict[str, Path], tiny_base: Path, corpus: Path
) -> None:
    cache = Cache(caches["bf16"])
    expected: dict[str, list] = {"train": [], "dev": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for document in CorpusReader(corpus_config(corpus), load_tokenizer(str(tiny_base))):
        expected[document.split] += [(document.name, s) for s in document.sequences]
        names[document.split].append(document.name)
    for split, wanted in expected.items():
        reader = cache.split(split)
        assert wanted
        assert reader.documents == names[split]
        found = []
        for number in range(reader.manifest.blocks):
            block = reader.block(number)
            for document, (a, b) in zip(block.document_S, block.rows_S2.tolist(), strict=True):
                found.append((reader.documents[document], block.ids_N[a:b], block.loss_mask_N[a:b]))
        assert len(found) == len(wanted) == reader.manifest.sequences
        for (name, ids, mask), (wanted_name, sequence) in zip(found, wanted, strict=True):
            assert name == wanted_name
            assert np.array_equal(ids, sequence.ids)
            assert np.array_equal(mask, sequence.loss_mask)
        assert reader.manifest.targets == sum(int(s.loss_mask.sum()) for _, s in wanted)
