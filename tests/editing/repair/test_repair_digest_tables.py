"""What a repair restores from digest tables and the corpus, and when it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cache_faults import names_in, served
from support.fixtures_extract import corpus_config, flip_byte, write_documents
from support.fixtures_repair import SHARD, TOKENS, computed, repaired, restored

from embedcache.cache.format.layout import MANIFEST, TOKENS_DIGESTS, marker_path
from embedcache.cache.verify import verify
from embedcache.errors import CacheError, CorpusError, OutputError
from embedcache.store.files import hash_file

DIGEST_TABLES = ["digests/train/tokens", "digests/dev/tokens", "digests/train/embeddings"]


@pytest.mark.parametrize("harm_file", [flip_byte, Path.unlink])
def test_digest_tables_are_restored_from_their_files(
    place: Path, out: Path, harm_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the corpus nor the base is read."""
    calls = computed(monkeypatch)
    for name in DIGEST_TABLES:
        harm_file(out / name)
    faults = verify(out).faults
    assert {(fault.kind, fault.file) for fault in faults} == {
        ("digest_table", name) for name in DIGEST_TABLES
    }
    with pytest.raises(CacheError, match=r"digests/"):
        served(out)
    hidden = place / "corpus.away"
    (place / "corpus").rename(hidden)
    try:
        repaired(place, out)
    finally:
        hidden.rename(place / "corpus")
    assert calls == []
    restored(place, out)


@pytest.mark.parametrize("complete", [True, False])
def test_a_digest_table_and_its_files_are_restored(place: Path, out: Path, complete: bool) -> None:
    """Also tokens without a digest, and a block without a marker."""
    for name in (*DIGEST_TABLES, TOKENS, SHARD):
        flip_byte(out / name)
    (out / "train/tokens/blocks/c/0").unlink()
    marker_path(out, "train", 1).unlink()
    if not complete:
        (out / MANIFEST).unlink()
    repaired(place, out)
    restored(place, out)


def test_a_digest_table_that_the_corpus_cannot_restore_is_refused(
    place: Path, out: Path, tmp_path: Path
) -> None:
    flip_byte(out / DIGEST_TABLES[0])
    flip_byte(out / TOKENS)
    kept = shutil.copytree(place / "corpus", tmp_path / "kept")
    before = {name: hash_file(out / name) for name in names_in(out)}
    try:
        for path in (place / "corpus").iterdir():
            path.write_text("another " + path.read_text())
        with pytest.raises(
            CacheError, match=rf"{DIGEST_TABLES[0]} is damaged, and the corpus no longer"
        ):
            repaired(place, out)
    finally:
        shutil.copytree(kept, place / "corpus", dirs_exist_ok=True)
    assert {name: hash_file(out / name) for name in names_in(out)} == before


def test_a_changed_corpus_cannot_restore_tokens_and_nothing_is_changed(
    place: Path, out: Path, tmp_path: Path
) -> None:
    corpus = place / "corpus"
    flip_byte(out / TOKENS)
    flip_byte(out / SHARD)
    before = {name: hash_file(out / name) for name in names_in(out)}
    kept = shutil.copytree(corpus, tmp_path / "kept")
    try:
        for path in corpus.iterdir():
            path.write_text("another " + path.read_text())
        with pytest.raises(CacheError, match=rf"{TOKENS} is damaged, and the corpus no longer"):
            repaired(place, out)
        for path in corpus.iterdir():
            path.unlink()
        with pytest.raises(CorpusError):
            repaired(place, out)
    finally:
        shutil.copytree(kept, corpus, dirs_exist_ok=True)
    assert {name: hash_file(out / name) for name in names_in(out)} == before
    repaired(place, out)
    restored(place, out)


def test_embeddings_are_repaired_without_the_corpus(place: Path, out: Path) -> None:
    flip_byte(out / SHARD)
    hidden = place / "corpus.away"
    (place / "corpus").rename(hidden)
    try:
        repaired(place, out)
    finally:
        hidden.rename(place / "corpus")
    restored(place, out)


def test_a_cache_without_any_digests_is_refused(place: Path, out: Path) -> None:
    (out / MANIFEST).unlink()
    flip_byte(out / TOKENS_DIGESTS)
    with pytest.raises(CacheError, match=r"neither manifest\.json nor tokens\.json is whole"):
        repaired(place, out)


def test_another_request_is_refused(place: Path, out: Path) -> None:
    flip_byte(out / SHARD)
    other = corpus_config(place / "corpus", split_seed=5)
    with pytest.raises(OutputError, match=r"split_seed was 0, now 5"):
        repaired(place, out, corpus=other)


def test_a_folder_without_a_cache_is_left_unchanged(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no cache to repair"):
        repaired(place, tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    mine = write_documents(tmp_path / "mine", 2)
    with pytest.raises(CacheError, match=r"holds no cache to repair"):
        repaired(place, mine)
    assert sorted(path.name for path in mine.iterdir()) == ["000.txt", "001.txt"]
