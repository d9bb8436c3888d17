"""Documents added to a finished cache are what they would be had they been there from the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cache_contents import contents, names
from support.digest_tables import files_of
from support.fixtures_append import added, every_byte, extracted
from support.fixtures_extract import flip_byte, write_documents

from embedcache.cache.cache import Cache, read_attributes
from embedcache.cache.format.layout import SPLITS
from embedcache.cache.verify import verify
from embedcache.editing.append_request import corpus_like
from embedcache.info import describe


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_it_is_what_one_extraction_of_both_gives(
    olds: dict[str, Path], codec: str, tiny_base: Path, corpus: Path, more: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(olds[codec], tmp_path / "cache")
    both = extracted(tmp_path / "both", tiny_base, corpus, more, codec=codec)
    before = every_byte(cache)
    told = added(cache, more)
    assert contents(cache) == contents(both)
    assert verify(cache, deep=True).faults == ()
    one, all_of_it = Cache(olds[codec]).manifest, Cache(cache).manifest
    for name in SPLITS:
        split, was = all_of_it.splits[name], one.splits[name]
        assert files_of(cache, name)[: was.blocks] == files_of(olds[codec], name)
        for key in ("documents", "sequences", "tokens"):
            new = getattr(told, key)[name]
            assert getattr(split, key) == getattr(was, key) + new
        assert split.tokens == Cache(both).manifest.splits[name].tokens
    after = every_byte(cache)
    changed = {path for path, data in before.items() if after.get(path) != data}
    tables = ("offsets", "document/", "tokens/blocks", "documents/", "zarr.json")
    told_in = ("manifest.json", "tokens.json")
    assert all(
        path in told_in or path.startswith("digests/") or any(table in path for table in tables)
        for path in changed
    ), changed
    for path in ("train/tokens/ids/c/0", f"train/tokens/span/c/{one.splits['train'].blocks}/0"):
        flip_byte(cache / path)
        assert [fault.file for fault in verify(cache).faults] == [path]
        flip_byte(cache / path)


def test_what_is_coded_with_the_calibration_that_is_there_is_near_what_is_not(
    olds: dict[str, Path], tiny_base: Path, corpus: Path, more: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(olds["transform"], tmp_path / "cache")
    before = every_byte(cache)
    added(cache, more)
    after = every_byte(cache)
    codec = [path for path in before if path.startswith(("codec/", "base/"))]
    assert codec
    assert all(after[path] == before[path] for path in codec)
    assert verify(cache, deep=True).faults == ()
    lossless = contents(extracted(tmp_path / "both", tiny_base, corpus, more))
    found = contents(cache)
    assert found.keys() == lossless.keys()
    known = contents(olds["transform"]).keys()

    def error(keys: list[Any]) -> float:
        """Return the mean square of what the codec loses, to that of what is there."""
        x, y = (
            np.concatenate([np.frombuffer(of[key]["final"], np.float32) for key in keys])
            for of in (lossless, found)
        )
        return float(((x - y) ** 2).mean() / (x**2).mean())

    train = [key for key in found if key[0] == "train"]
    old, new = (error([k for k in train if (k in known) == is_old]) for is_old in (True, False))
    assert 0 < new < 2 * old < 1


def test_a_text_that_is_there_is_passed_over_whatever_its_name(
    old: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = write_documents(tmp_path / "new", 2, seed=5)
    (folder / "copy.txt").write_bytes((corpus / "003.txt").read_bytes())
    told = added(old, folder)
    assert (sum(told.documents.values()), told.already_there) == (2, 1)
    found = {name for split in SPLITS for name in names(old, split)}
    assert {"000.txt", "000.txt@2", "001.txt@2"} <= found
    assert "copy.txt" not in found


def test_a_dry_run_says_what_is_added_and_the_same_again_adds_nothing(
    old: Path, more: Path
) -> None:
    before = every_byte(old)
    assert describe(old)["appended"] == []
    told = added(old, more, dry_run=True)
    assert every_byte(old) == before
    done = added(old, more)
    assert told.dry_run
    assert (sum(done.documents.values()), done.already_there) == (9, 0)
    same = ("documents", "sequences", "tokens", "already_there", "elsewhere")
    assert [getattr(told, key) for key in same] == [getattr(done, key) for key in same]
    assert told.bytes > 0
    before = every_byte(old)
    again = added(old, more)
    assert (sum(again.documents.values()), again.already_there) == (0, 9)
    assert every_byte(old) == before
    assert not (old / ".staging").exists()
    (part,) = describe(old)["appended"]
    assert [part[key] for key in ("documents", "tokens")] == [done.documents, done.tokens]
    assert part["sources"] == [str(more)]
    assert part["at"].endswith("+00:00")


def test_limits_read_the_same_documents_again(old: Path, more: Path) -> None:
    assert sum(added(old, more, limit_documents=4).documents.values()) == 4
    again = added(old, more, limit_documents=4)
    assert (sum(again.documents.values()), again.already_there) == (0, 4)


def edited(old: Path, corpus: Path, folder: Path) -> Path:
    """Write a copy of every document of a cache's corpus with a few words at its end."""
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / f"edited-{path.name}").write_text(path.read_text() + " and the lazy fox")
    return folder


@pytest.mark.parametrize("way", ["by rule", "all test", "listed"])
def test_near_duplicates_never_cross_splits(
    old: Path, corpus: Path, tmp_path: Path, way: str
) -> None:
    folder = edited(old, corpus, tmp_path / "edited")
    places = {name: split for split in SPLITS for name in names(old, split)}
    assert {*places.values()} == {*SPLITS}
    write_documents(folder / "others", 3, seed=7)
    if way == "by rule":
        told = added(old, folder, dev_fraction=0.45, test_fraction=0.45)
    elif way == "all test":
        told = added(old, folder / "others", test_sources=(str(folder),))
    else:
        (tmp_path / "list.json").write_text(
            json.dumps({"dev": [f"edited-{name}" for name in places]})
        )
        told = added(old, folder, split_file=str(tmp_path / "list.json"))
    found = {name: split for split in SPLITS for name in names(old, split)}
    assert {name: found[f"edited-{name}"] for name in places} == places
    asked = {"by rule": None, "all test": "test", "listed": "dev"}[way]
    assert told.elsewhere == sum(split != asked for split in places.values() if asked)


def test_splits_are_given_as_for_an_extraction(old: Path, more: Path, tmp_path: Path) -> None:
    held_out = write_documents(tmp_path / "held", 4, seed=8)
    told = added(old, more, test_sources=(str(held_out),), dev_fraction=0.0)
    assert told.documents == {"train": 9, "dev": 0, "test": 4}
    again = added(old, held_out)  # whatever split it would go to now
    assert (again.already_there, again.documents["train"]) == (4, 0)
    told = added(old, write_documents(tmp_path / "all", 5, seed=9), dev_fraction=0, test_fraction=0)
    assert told.documents == {"train": 5, "dev": 0, "test": 0}


def test_a_log_that_has_grown_goes_on_in_its_split(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.corpus.sources.text.WHOLE_BYTES", 400)
    monkeypatch.setattr("embedcache.corpus.sources.text.PIECE_CHARACTERS", 200)
    log = tmp_path / "log.txt"
    lines = [f"line {number} says the quick brown fox jumps {number**3}\n" for number in range(40)]
    log.write_text("".join(lines[:20]))
    first = added(old, log)
    log.write_text("".join(lines))
    second = added(old, log)
    assert second.already_there == sum(first.documents.values()) - 1  # the last was not full
    assert sum(second.documents.values()) > 0
    (split,) = (name for name, count in first.documents.items() if count)
    assert [name for name, count in second.documents.items() if count] == [split]


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_not_said_is_as_the_cache_has_it(
    tiny_base: Path, more: Path, tmp_path: Path, listed: bool
) -> None:
    records = tmp_path / "train.jsonl"
    records.write_text(
        '{"q": "what is the capital of France", "a": "Paris and the lazy dog"}\n' * 3
    )
    (tmp_path / "list.json").write_text('{"train": ["train.jsonl:1", "train.jsonl:2"]}')
    test = write_documents(tmp_path / "test", 2, seed=3)
    splits: dict[str, Any] = {"dev_sources": (str(test),), "test_fraction": 0.3}
    if listed:
        splits = {"split_file": str(tmp_path / "list.json")}
    asked = {"prompt": "{q}? ", "completion": "{a}", "min_tokens": 3, "split_seed": 7, **splits}
    out = tmp_path / "cache"
    extracted(out, tiny_base, records, **asked, limit_documents=2)
    attributes = read_attributes(out)
    config = corpus_like(attributes, {"sources": (str(more),)})
    assert (config.prompt, config.completion, config.min_tokens) == ("{q}? ", "{a}", 3)
    assert (config.context, config.split_seed, config.limit_documents) == (64, 7, None)
    assert config.split_file is None and config.dev_sources == ()
    # Dev was a source of its own, or all was listed: what is added is no part of it unasked.
    assert config.fractions == ((0.0, 0.0) if listed else (0.0, 0.3))
    other = corpus_like(attributes, {"sources": ("a",), "text_field": "a", "dev_fraction": 0.5})
    assert (other.prompt, other.text_field, other.dev_fraction) == (None, "a", 0.5)
