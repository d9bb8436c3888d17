"""A deletion leaves no byte of the document, and the other documents as they were."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support.cache_contents import contents, names
from support.cache_faults import served
from support.digest_tables import files_of, put_aside, quarantined
from support.fixtures_extract import comparable_tree, corpus_config, flip_byte, small_settings
from support.forked import run_until_step

from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.cache import Cache
from embedcache.cache.codecs.integers import ARRAYS, codec_name
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.manifest.digests import publish_digests
from embedcache.cache.manifest.manifest import publish_manifest, read_manifest
from embedcache.cache.tokens.files import write_tokens_digests
from embedcache.cache.tokens.reader import SplitTokens
from embedcache.cache.tokens.tables import SplitTables
from embedcache.cache.verify import verify
from embedcache.data.loader import BatchLoader
from embedcache.data.sample import sample_embeddings
from embedcache.editing.delete import delete
from embedcache.editing.repair import repair as repair_cache
from embedcache.errors import CacheError, UsageError
from embedcache.extraction.extract import extract
from embedcache.info import describe


def rows_of(path: Path, split: str, name: str) -> np.ndarray[Any, Any]:
    """Return the rows, in the split's arrays, of a document."""
    group = zarr.open_group(path / split, mode="r")
    number = Cache(path).split(split).documents.index(name)
    spans = group["tokens/offsets"][:][group["tokens/document"][:] == number].astype(np.int64)
    return np.concatenate([np.arange(a, b) for a, b in spans.tolist()])


@pytest.fixture
def cache(caches: dict[str, Path], codec: str, tmp_path: Path) -> Path:
    return shutil.copytree(caches[codec], tmp_path / "cache")


def test_other_documents_are_read_as_before_and_counted(copied: Path) -> None:
    cache = copied
    before, old = contents(cache), Cache(cache).manifest
    gone = [names(cache, "train")[1], names(cache, "dev")[0]]
    kept = {key: value for key, value in before.items() if key[1] not in gone}
    assert len(kept) < len(before)
    summary = delete(str(cache), gone)
    assert contents(cache) == kept
    assert summary.documents == tuple(sorted(gone))
    assert sum(summary.sequences.values()) == len(before) - len(kept)
    assert verify(cache, deep=True).faults == ()
    new = Cache(cache).manifest
    assert new.hash != old.hash
    described = describe(cache)
    for name in SPLITS:
        of_split = {key: value for key, value in kept.items() if key[0] == name}
        ids = [len(value["ids"]) // 8 for value in of_split.values()]
        masks = [sum(value["mask"]) for value in of_split.values()]
        expected = (len(of_split), sum(ids), sum(masks), len({key[1] for key in of_split}))
        split = new.splits[name]
        assert (split.sequences, split.tokens, split.targets, split.documents) == expected
        assert described["splits"][name]["tokens"] == split.tokens
    assert described["corpus"]["deleted"]["documents"] == 2
    assert not (cache / ".staging").exists()


def decoded(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return every array of a cache, read by zarr alone."""
    group = zarr.open_group(path, mode="r")
    return {
        meta.parent.relative_to(path).as_posix(): group[meta.parent.relative_to(path).as_posix()][:]
        for meta in path.rglob("zarr.json")
        if '"node_type": "array"' in meta.read_text()
    }


def test_no_byte_of_a_deleted_document_is_left(cache: Path) -> None:
    name = "secret/plan of the fox.txt"
    rename(cache, "train", 2, name)
    rows = rows_of(cache, "train", name)
    before = decoded(cache)
    ids = before["train/tokens/ids"][rows]
    windows = [ids[i : i + 24].tobytes() for i in range(0, len(ids) - 24, 8)]
    assert all(window in before["train/tokens/ids"].tobytes() for window in windows)
    delete(cache, [name])
    after = decoded(cache)
    settings = Cache(cache).attributes.settings
    specs = ARRAYS[codec_name("train", settings.codec)]
    arrays = [f"{spec.group}/{tap}" for spec in specs for tap in settings.taps]
    for array in ["tokens/ids", "tokens/loss_mask", "tokens/span", *arrays]:
        assert before[f"train/{array}"][rows].any()
        assert not after[f"train/{array}"][rows].any(), array
    for path in (path for path in cache.rglob("*") if path.is_file()):
        assert b"plan of the fox" not in path.read_bytes(), path
        assert b"plan of the fox" not in str(path).encode()
    for array, values in after.items():
        assert b"plan of the fox" not in values.tobytes(), array
        assert not any(window in values.tobytes() for window in windows), array


def rename(cache: Path, split: str, number: int, name: str) -> None:
    """Rename a document of a finished cache."""
    tokens = SplitTokens(cache, split, 256)
    tables = SplitTables.read(tokens)
    changed = [*tables.names]
    changed[number] = name
    for folder in ("tokens/offsets", "tokens/document", "tokens/blocks", "documents"):
        shutil.rmtree(cache / split / folder)
    group = zarr.open_group(cache / split, mode="r+")
    group.create_group("documents")
    replace(tables, names=tuple(changed)).write(group)
    manifest = read_manifest(cache)
    seal = write_tokens_digests(cache)
    publish_digests(cache, seal)
    publish_manifest(cache, replace(manifest, tokens=seal))
    assert verify(cache, deep=True).faults == ()


def test_quarantined_sequences_are_renumbered(copied: Path) -> None:
    train = read_manifest(copied).splits["train"]
    last = train.sequences - 1
    files = files_of(copied, "train")[-1]
    writer = BlockWriter(copied)
    writer.renew("train", train.blocks - 1, files, quarantined=(last,), generation=1)
    writer.close()
    put_aside(copied, "train", train.blocks - 1, (last,))
    assert verify(copied, deep=True).faults == ()
    before = contents(copied)
    gone = names(copied, "train")[0]
    summary = delete(copied, gone)
    assert contents(copied) == {key: value for key, value in before.items() if key[1] != gone}
    assert quarantined(copied, "train") == (last - summary.sequences["train"],)
    assert verify(copied, deep=True).faults == ()


def test_readers_pass_over_empty_blocks(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = shutil.copytree(caches["transform"], tmp_path / "cache")
    *gone, kept = names(cache, "train")
    before = contents(cache)
    delete(cache, gone)
    delete(cache, names(cache, "dev"))
    assert contents(cache) == {
        key: value for key, value in before.items() if key[1] == kept or key[0] == "test"
    }
    opened = Cache(cache)
    assert not opened.has("dev")
    train = opened.split("train")
    assert any(not len(train.sequences(b)[0]) for b in range(train.manifest.blocks))
    batches = list(BatchLoader(train, batch_tokens=128, taps=("final",)).epoch(0))
    assert sum(batch.tokens for batch in batches) == train.manifest.tokens
    assert len(sample_embeddings(train, ("final",))["final"]) == train.manifest.tokens
    with pytest.raises(UsageError, match="at least one train document to stay"):
        delete(cache, [kept])
    assert verify(cache, deep=True).faults == ()


def test_a_dry_run_returns_the_same_summary_and_writes_nothing(copied: Path) -> None:
    gone = names(copied, "train")[0]
    before = comparable_tree(copied)
    planned = delete(copied, [gone], dry_run=True)
    assert comparable_tree(copied) == before
    assert planned.dry_run
    assert replace(planned, dry_run=False) == delete(copied, [gone])


def test_an_unknown_name_changes_nothing(copied: Path) -> None:
    before = comparable_tree(copied)
    known = names(copied, "train")[0]
    with pytest.raises(UsageError, match=rf"no document '{known}t'.*Did you mean '{known}'"):
        delete(copied, [known, f"{known}t"])
    assert comparable_tree(copied) == before


def test_damage_is_refused_only_in_a_block_that_is_rewritten(copied: Path) -> None:
    gone = names(copied, "train")[0]
    blocks = (rows_of(copied, "train", gone) // 256).tolist()
    other = next(b for b in range(read_manifest(copied).splits["train"].blocks) if b not in blocks)
    damaged = ("test/tokens/ids/c/0", f"train/embeddings/final/c/{other}/0")
    for path in damaged:
        flip_byte(copied / path)
    own = copied / f"train/embeddings/final/c/{blocks[0]}/0"
    flip_byte(own)
    before = comparable_tree(copied)
    with pytest.raises(CacheError, match=rf"nothing was deleted: {own} is damaged"):
        delete(copied, gone)
    assert comparable_tree(copied) == before
    flip_byte(own)
    assert delete(copied, gone).documents == (gone,)
    assert {fault.file for fault in verify(copied, deep=True).faults} == {*damaged}


def test_a_reader_that_was_open_serves_the_old_blocks_or_raises(copied: Path) -> None:
    gone = names(copied, "train")[0]
    reader = Cache(copied).split("train")
    other = Cache(copied).split("train")
    first = reader.block(reader.manifest.blocks - 1)
    delete(copied, [gone])
    again = reader.block(reader.manifest.blocks - 1)  # the reader has these tables in memory
    assert np.array_equal(again.rows_S2, first.rows_S2)
    with pytest.raises(CacheError):
        other.block(reader.manifest.blocks - 1)
    with pytest.raises(CacheError):
        reader.block(0)


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_deletion_killed_at_any_step_is_finished_by_the_same_call(
    caches: dict[str, Path], tiny_base: Path, corpus: Path, tmp_path: Path, count: int
) -> None:
    name = names(caches["int8"], "train")[0]
    whole = shutil.copytree(caches["int8"], tmp_path / "whole")
    done = run_until_step(10**6, partial(delete, whole, [name]))
    assert isinstance(done, tuple)
    committed, steps = done
    before, after = served(caches["int8"]), served(whole)
    # The first step, two while files are moved into place, and one after the new manifest.
    moments = [0, committed + 3, (committed + steps) // 2, steps - 1]
    if count > 4:
        moments = [*range(0, steps, steps // (count - 4)), *range(steps - 4, steps)]
    states = set()
    for number, step in enumerate(moments):
        cache = shutil.copytree(caches["int8"], tmp_path / "cache")
        assert run_until_step(step, partial(delete, cache, [name])) == -signal.SIGKILL
        try:
            found = served(cache)
            assert found in (before, after), step
            states.add("before" if found == before else "after")
        except CacheError as error:
            assert "is not complete" in str(error)
            states.add("refused")
        complete = (cache / "manifest.json").is_file()
        if number % 2 and not complete:  # the extraction that made the cache finishes it, too
            extract(
                corpus_config(corpus),
                base=str(tiny_base),
                out=cache,
                settings=small_settings(codec="int8", taps=("final", "layer_1")),
                device="cpu",
            )
        elif not complete or name in names(cache, "train"):
            assert delete(cache, [name]).documents == (name,)
        assert served(cache) == after, step
        assert verify(cache, deep=True).faults == ()
        shutil.rmtree(cache)
    assert states == {"before", "refused", "after"}


def repair(cache: Path, base: Path, corpus: Path) -> Any:
    return repair_cache(
        cache,
        corpus_config(corpus),
        base=str(base),
        settings=small_settings(codec="int8", taps=("final", "layer_1")),
        device="cpu",
    )


@pytest.mark.parametrize("only_empty", [False, True])
def test_a_repair_computes_embeddings_without_the_deleted_document(
    copied: Path, tiny_base: Path, corpus: Path, only_empty: bool
) -> None:
    gone = names(copied, "train")[1:]
    rows = np.concatenate([rows_of(copied, "train", name) for name in gone])
    delete(copied, gone)
    before = contents(copied)
    train = Cache(copied).split("train")
    for block in range(train.manifest.blocks):
        if only_empty and len(train.sequences(block)[0]):
            continue
        flip_byte(copied / f"train/embeddings/final/c/{block}/0")
    repair(copied, tiny_base, corpus)
    assert verify(copied, deep=True).faults == ()
    after = contents(copied)
    assert after.keys() == before.keys()
    assert all(after[key]["ids"] == before[key]["ids"] for key in after)
    assert not decoded(copied)["train/embeddings/final"][rows].any()


def test_a_repair_never_takes_tokens_of_a_deleted_document_from_the_corpus(
    copied: Path, tiny_base: Path, corpus: Path
) -> None:
    name = names(copied, "train")[0]
    rows = rows_of(copied, "train", name)
    delete(copied, name)
    damaged = copied / f"train/tokens/ids/c/{int(rows[0]) // 256}"
    flip_byte(damaged)
    held = damaged.read_bytes()
    with pytest.raises(CacheError, match="the corpus no longer yields the tokens"):
        repair(copied, tiny_base, corpus)
    assert damaged.read_bytes() == held
    with pytest.raises(CacheError):
        contents(copied)
