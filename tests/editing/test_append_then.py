"""A cache that was added to is read, deleted from, merged, repaired and added to as any other."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.cache_contents import Content, contents, names
from support.fixtures_append import added, extracted
from support.fixtures_extract import corpus_config, flip_byte, write_documents

from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.verify import verify
from embedcache.carryon.branch.config import BranchConfig
from embedcache.editing.delete import delete
from embedcache.editing.merge import merge
from embedcache.errors import CacheError, OutputError
from embedcache.extraction.extract import extract
from embedcache.info import describe
from embedcache.training.config import TrainConfig
from embedcache.training.train import train


def without(content: Content, name: str) -> Content:
    return {key: value for key, value in content.items() if key[1] != name}


def test_it_can_be_deleted_merged_repaired_and_added_to(
    old: Path, olds: dict[str, Path], corpus: Path, more: Path, tiny_base: Path, tmp_path: Path
) -> None:
    earlier = names(old, "train")
    added(old, more)
    gone = names(old, "train")[len(earlier)]
    whole = contents(old)
    delete(old, [gone])
    assert contents(old) == without(whole, gone)
    assert sum(added(old, more).documents.values()) == 1  # it is there no more
    assert [len(of) for of in (contents(old), whole)] == [len(whole)] * 2
    # The command that made it in the first place still goes over it, and repairs all of it.
    train = Cache(old).manifest.splits["train"]
    first = Cache(olds["int8"]).manifest.splits["train"].blocks
    before = contents(old)
    for block in (0, first, train.blocks - 1):
        flip_byte(old / f"train/embeddings/final/c/{block}/0")
    settings = Cache(old).attributes.settings
    flip_byte(old / "train/tokens/ids/c/0")
    extract(
        corpus_config(corpus),
        base=str(tiny_base),
        out=old,
        settings=settings,
        device="cpu",
        repair=True,
    )
    assert contents(old) == before
    assert verify(old, deep=True).faults == ()
    assert len(describe(old)["appended"]) == 2
    other = extracted(
        tmp_path / "other", tiny_base, write_documents(tmp_path / "o", 5, seed=6), codec="int8"
    )
    merge([old, other], tmp_path / "both")
    corpora = Cache(tmp_path / "both").attributes.corpus["parts"]
    assert [Path(part["config"]["sources"][0]) for part in corpora] == [
        corpus,
        more,
        more,
        tmp_path / "o",
    ]
    assert all("appended" not in part for part in corpora)
    told = added(tmp_path / "both", more, write_documents(tmp_path / "last", 2, seed=11))
    assert (sum(told.documents.values()), told.already_there) == (2, 9)
    assert verify(tmp_path / "both", deep=True).faults == ()
    assert describe(tmp_path / "both")["appended"][0]["sources"][1] == str(tmp_path / "last")


def test_tables_of_many_chunks_grow_and_shrink(
    tiny_base: Path, corpus: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tables", "reader"):
        monkeypatch.setattr(f"embedcache.cache.tokens.{module}.TABLE_CHUNK", 3)
    cache = extracted(tmp_path / "cache", tiny_base, corpus)

    def chunks() -> dict[str, int]:
        assert verify(cache, deep=True).faults == ()
        split = Cache(cache).manifest.splits["train"]
        rows = {
            "tokens/offsets": split.sequences,
            "tokens/blocks": split.blocks + 1,
            "documents/fingerprint": split.documents,
        }
        folders = {name: cache / "train" / name / "c" for name in rows}
        found = {n: sum(p.is_file() for p in c.rglob("*")) for n, c in folders.items()}
        assert found == {name: -(-count // 3) for name, count in rows.items()}
        return found

    before, earlier = chunks(), contents(cache)
    added(cache, more)
    assert chunks()["tokens/offsets"] > before["tokens/offsets"] > 1
    delete(cache, sorted({name for _, name, _ in contents(cache).keys() - earlier.keys()}))
    assert chunks() | {"tokens/blocks": 0} == before | {"tokens/blocks": 0}  # blocks stay
    assert contents(cache) == earlier


def test_damaged_tokens_of_what_was_added_are_not_taken_from_another_corpus(
    old: Path, corpus: Path, more: Path, tiny_base: Path
) -> None:
    blocks = Cache(old).manifest.splits["train"].blocks
    added(old, more)
    flip_byte(old / f"train/tokens/ids/c/{blocks}")
    with pytest.raises(CacheError, match="the corpus no longer yields the tokens"):
        extract(
            corpus_config(corpus),
            base=str(tiny_base),
            out=old,
            settings=read_attributes(old).settings,
            device="cpu",
            repair=True,
        )


CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=1), epochs=2, batch_tokens=256, lr=5e-3, samples=50
)


def test_training_reads_all_of_it_and_a_run_on_what_was_is_refused(
    old: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    before = Cache(old).manifest.splits["train"].tokens
    with monkeypatch.context() as patch:
        patch.setattr("embedcache.training.run.run.publish_report", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(old, out=tmp_path / "run", config=CONFIG, device="cpu")
    copy = shutil.copytree(old, tmp_path / "copy")
    added(old, more)
    with pytest.raises(OutputError, match=r"documents were added or deleted. Give another --out"):
        train(old, out=tmp_path / "run", config=CONFIG, device="cpu")
    assert train(copy, out=tmp_path / "run", config=CONFIG, device="cpu").tokens == 2 * before
    done = train(old, out=tmp_path / "new", config=CONFIG, device="cpu")
    assert done.tokens == 2 * Cache(old).manifest.splits["train"].tokens > 2 * before


def test_a_reader_that_was_open_serves_what_was_or_nothing(old: Path, more: Path) -> None:
    reader, other = (Cache(old).split("train") for _ in range(2))
    last = reader.manifest.blocks - 1
    first = reader.block(last)
    added(old, more)
    again = reader.block(last)  # its tables are in memory
    assert asdict_bytes(again) == asdict_bytes(first)
    with pytest.raises(CacheError, match="documents were added to the cache, or deleted"):
        other.block(last)


def asdict_bytes(block: Any) -> dict[str, bytes]:
    return {key: repr(value).encode() for key, value in asdict(block).items()}
