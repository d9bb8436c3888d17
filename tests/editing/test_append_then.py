"""A cache with appended documents is read, edited, repaired and trained from like any other."""

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
from embedcache.editing.repair import repair as repair_cache
from embedcache.errors import CacheError, OutputError
from embedcache.info import describe
from embedcache.training.config import TrainConfig
from embedcache.training.train import train


def without(content: Content, name: str) -> Content:
    return {key: value for key, value in content.items() if key[1] != name}


def repair(cache: Path, corpus: Path, base: Path) -> None:
    repair_cache(
        cache,
        corpus_config(corpus),
        base=str(base),
        settings=read_attributes(cache).settings,
        device="cpu",
    )


def test_documents_are_deleted_appended_again_repaired_and_merged(
    grown: Path,
    olds: dict[str, Path],
    corpus: Path,
    more: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    gone = names(grown, "train")[len(names(olds["int8"], "train"))]
    whole = contents(grown)
    delete(grown, [gone])
    assert contents(grown) == without(whole, gone)
    assert sum(added(grown, more).documents.values()) == 1  # it is there no more
    assert [len(of) for of in (contents(grown), whole)] == [len(whole)] * 2
    # The extraction that made the cache repairs old and new blocks.
    train = Cache(grown).manifest.splits["train"]
    first = Cache(olds["int8"]).manifest.splits["train"].blocks
    before = contents(grown)
    for block in (0, first, train.blocks - 1):
        flip_byte(grown / f"train/embeddings/final/c/{block}/0")
    flip_byte(grown / "train/tokens/ids/c/0")
    repair(grown, corpus, tiny_base)
    assert contents(grown) == before
    assert verify(grown, deep=True).faults == ()
    assert len(describe(grown)["appended"]) == 2
    other = extracted(
        tmp_path / "other", tiny_base, write_documents(tmp_path / "o", 5, seed=6), codec="int8"
    )
    merge([grown, other], tmp_path / "both")
    corpora = Cache(tmp_path / "both").attributes.corpus["parts"]
    assert [Path(part["config"]["sources"][0]) for part in corpora] == [
        corpus,
        more,
        more,
        tmp_path / "o",
    ]
    assert all("appended" not in part for part in corpora)
    summary = added(tmp_path / "both", more, write_documents(tmp_path / "last", 2, seed=11))
    assert (sum(summary.documents.values()), summary.already_there) == (2, 9)
    assert verify(tmp_path / "both", deep=True).faults == ()
    assert describe(tmp_path / "both")["appended"][0]["sources"][1] == str(tmp_path / "last")


def test_damaged_tokens_of_appended_documents_are_not_repaired_from_another_corpus(
    grown: Path, olds: dict[str, Path], corpus: Path, tiny_base: Path
) -> None:
    blocks = Cache(olds["int8"]).manifest.splits["train"].blocks
    flip_byte(grown / f"train/tokens/ids/c/{blocks}")
    with pytest.raises(CacheError, match="the corpus no longer yields the tokens"):
        repair(grown, corpus, tiny_base)


CONFIG = TrainConfig(
    carryon=BranchConfig(width=32, blocks=1), epochs=2, batch_tokens=256, lr=5e-3, samples=50
)


def test_a_run_begun_before_an_append_needs_the_cache_as_it_was(
    old: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    before = Cache(old).manifest.splits["train"].tokens
    with monkeypatch.context() as patch:
        patch.setattr("embedcache.training.run.run.publish_report", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(old, out=tmp_path / "run", config=CONFIG, device="cpu")
    copy = shutil.copytree(old, tmp_path / "copy")
    shutil.rmtree(old)
    grown.rename(old)
    with pytest.raises(OutputError, match=r"documents were added or deleted\. Pass another `out=`"):
        train(old, out=tmp_path / "run", config=CONFIG, device="cpu")
    assert train(copy, out=tmp_path / "run", config=CONFIG, device="cpu").tokens == 2 * before
    done = train(old, out=tmp_path / "new", config=CONFIG, device="cpu")
    assert done.tokens == 2 * Cache(old).manifest.splits["train"].tokens > 2 * before


def test_a_reader_that_was_open_serves_the_old_blocks_or_raises(old: Path, more: Path) -> None:
    reader, other = (Cache(old).split("train") for _ in range(2))
    last = reader.manifest.blocks - 1
    first = reader.block(last)
    added(old, more)
    again = reader.block(last)  # the reader has these tables in memory
    assert values_of(again) == values_of(first)
    with pytest.raises(CacheError, match="documents were added or deleted since"):
        other.block(last)


def values_of(block: Any) -> dict[str, bytes]:
    return {key: repr(value).encode() for key, value in asdict(block).items()}
