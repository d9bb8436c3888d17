"""Documents added to a finished cache are what they would be had they been there from the first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_contents import Content, contents, names
from fixtures_extract import comparable_tree, corpus_config, flip_byte, write_documents
from tiny import tiny_base_directory

import embedcache.append as verb
from embedcache.append import Appended, append
from embedcache.append_request import corpus_like
from embedcache.cache.claims import Claims
from embedcache.cache.layout import SPLITS, ExtractSettings
from embedcache.cache.reader import Cache, read_attributes
from embedcache.cache.verify import verify
from embedcache.carryon.config import CarryOnConfig
from embedcache.delete import delete
from embedcache.errors import (
    CacheError,
    CorpusError,
    IdentityError,
    OutputError,
    UsageError,
)
from embedcache.extract import extract
from embedcache.info import describe
from embedcache.merge import merge
from embedcache.train import train
from embedcache.training.config import TrainConfig

ALONE: dict[str, Any] = {"context": 64, "block_tokens": 256, "batch_tokens": 1}
"""Each sequence is computed alone, so that its embeddings are the same bits in any block."""


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other texts than ``corpus``'s, half of them under the same names."""
    folder = write_documents(tmp_path_factory.mktemp("more") / "corpus", count=9, seed=1)
    for number in range(0, 9, 2):
        (folder / f"{number:03}.txt").rename(folder / f"other-{number}.txt")
    return folder


def extracted(out: Path, base: Path, *sources: Path, codec: str = "bf16", **more: Any) -> Path:
    config = replace(
        corpus_config(sources[0]), sources=tuple(map(str, sources)), **more.pop("corpus", {})
    )
    settings = ExtractSettings(**{**ALONE, "codec": codec, "taps": ("final", "layer_1"), **more})
    extract(config, base=str(base), out=out, settings=settings, device="cpu")
    return out


def added(cache: Path, *sources: Path | str, **more: Any) -> Appended:
    """Append as the command does."""
    request = {key: more.pop(key) for key in [*more] if key in ("dry_run", "settings", "base")}
    given = {"sources": tuple(map(str, sources)), **more}
    config = corpus_like(read_attributes(cache), given)
    return append(config, out=cache, device="cpu", **request)


@pytest.fixture(scope="module")
def olds(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, corpus: Path
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("olds")
    codecs = ("bf16", "int8", "transform")
    return {c: extracted(root / c, tiny_base, corpus, codec=c) for c in codecs}


@pytest.fixture
def old(olds: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(olds["int8"], tmp_path / "cache")


@pytest.fixture
def untouched(old: Path) -> Iterator[Path]:
    """A cache that must be, in the end, byte for byte what it was."""
    before = every_byte(old)
    yield old
    assert every_byte(old) == before


def every_byte(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()}


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
        assert split.files[: was.blocks] == was.files
        for key in ("documents", "sequences", "tokens"):
            new = getattr(told, key)[name]
            assert getattr(split, key) == getattr(was, key) + new
        assert split.tokens == Cache(both).manifest.splits[name].tokens
    after = every_byte(cache)
    changed = {path for path, data in before.items() if after.get(path) != data}
    tables = ("offsets", "document/", "tokens/blocks", "documents/", "zarr.json")
    assert all(
        path in ("manifest.json", "sealed.json") or any(table in path for table in tables)
        for path in changed
    ), changed


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


def test_the_same_again_changes_nothing(old: Path, more: Path) -> None:
    told = added(old, more)
    assert (sum(told.documents.values()), told.already_there) == (9, 0)
    before = every_byte(old)
    again = added(old, more)
    assert (sum(again.documents.values()), again.already_there) == (0, 9)
    assert every_byte(old) == before
    assert not (old / ".staging").exists()


def test_limits_read_the_same_documents_again(old: Path, more: Path) -> None:
    assert sum(added(old, more, limit_documents=4).documents.values()) == 4
    again = added(old, more, limit_documents=4)
    assert (sum(again.documents.values()), again.already_there) == (0, 4)
    assert sum(added(old, more).documents.values()) == 5


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


def test_a_dry_run_says_the_same_and_writes_nothing(untouched: Path, more: Path) -> None:
    told = added(untouched, more, dry_run=True)
    copy = shutil.copytree(untouched, untouched.parent / "copy")
    done = added(copy, more)
    assert told.dry_run
    same = ("documents", "sequences", "tokens", "already_there", "elsewhere")
    assert [getattr(told, key) for key in same] == [getattr(done, key) for key in same]
    assert told.bytes > 0


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
    monkeypatch.setattr("embedcache.corpus.text.WHOLE_BYTES", 400)
    monkeypatch.setattr("embedcache.corpus.text.PIECE_CHARACTERS", 200)
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
    extracted(out, tiny_base, records, corpus={**asked, "limit_documents": 2})
    attributes = read_attributes(out)
    config = corpus_like(attributes, {"sources": (str(more),)})
    assert (config.prompt, config.completion, config.min_tokens) == ("{q}? ", "{a}", 3)
    assert (config.context, config.split_seed, config.limit_documents) == (64, 7, None)
    assert config.split_file is None and config.dev_sources == ()
    # Dev was a source of its own, or all was listed: what is added is no part of it unasked.
    assert config.fractions == ((0.0, 0.0) if listed else (0.0, 0.3))
    other = corpus_like(attributes, {"sources": ("a",), "text_field": "a", "dev_fraction": 0.5})
    assert (other.prompt, other.text_field, other.dev_fraction) == (None, "a", 0.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"codec": "bf16"}, "--codec int8, .* found --codec bf16. Leave --codec out"),
        ({"taps": ("final",)}, "--taps final,layer_1, .* found --taps final"),
        ({"context": 128}, "--context 64, .* found --context 128"),
        ({"block_tokens": 512}, "--block-tokens 256, .* found --block-tokens 512"),
        ({"bits": 2.0}, "--bits left out, .* found --bits 2.0"),
    ],
)
def test_another_setting_is_refused_with_both(
    untouched: Path, more: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        added(untouched, more, settings=asked)


def test_another_context_base_or_type_is_refused(
    untouched: Path, more: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--context 64, .* found --context 32"):
        append(corpus_config(more, context=32), out=untouched)
    with pytest.raises(UsageError, match=r"computed in float32, .* found --dtype bfloat16"):
        append(corpus_config(more), out=untouched, dtype="bfloat16")
    other = tiny_base_directory(tmp_path / "other", seed=1)
    with pytest.raises(IdentityError, match=r"the cache .* and --base .*differ in: weights"):
        added(untouched, more, base=str(other))


def test_bad_input_leaves_the_cache_as_it_was(untouched: Path, tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "bad", 3, seed=4)
    (folder / "zzz.txt").write_bytes(b"good to begin with \xff\xfe and then not")
    with pytest.raises(CorpusError):
        added(untouched, folder)
    with pytest.raises(CorpusError, match="nothing there"):
        added(untouched, tmp_path / "none")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match="Expected text"):
        added(untouched, tmp_path / "short.txt")


def test_while_another_writes_it_is_refused(untouched: Path, more: Path) -> None:
    with Claims(untouched) as other:
        assert other.take("turn")
        with pytest.raises(OutputError, match=r"--append needs .* alone.*process \d+"):
            added(untouched, more)


def test_others_are_refused_meanwhile(
    old: Path, more: Path, corpus: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def trying(*arguments: Any, **named: Any) -> Any:
        for what in (
            lambda: added(old, more),
            lambda: delete(old, ["000.txt"]),
            lambda: extract(
                corpus_config(corpus),
                base=str(tiny_base),
                out=old,
                settings=Cache(old).attributes.settings,
                device="cpu",
                repair=True,
            ),
        ):
            with pytest.raises(OutputError, match="alone, and it is being written by") as caught:
                what()
            refused.append(str(caught.value).split()[0])
        return extract(*arguments, **named)

    monkeypatch.setattr(verb, "extract", trying)
    added(old, more)
    assert refused == ["--append", "delete", "--repair"]
    assert verify(old, deep=True).faults == ()


def test_an_unfinished_cache_or_none_is_refused(old: Path, more: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such cache"):
        append(corpus_config(more), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (old / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is not complete"):
        added(old, more)


class StoppedError(Exception):
    """Stands for a computer that was switched off while it computed."""


def begin(cache: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an append of ``more`` half done."""

    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("embedcache.extraction.pipeline.BlockWriter.commit", stopped)
        with pytest.raises(StoppedError):
            added(cache, more)


def test_one_that_was_begun_goes_on_or_is_dropped(
    old: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    begin(old, more, monkeypatch)
    assert contents(old) == before
    with pytest.raises(OutputError, match=r"append of .* begun and is not finished.*rm -r") as told:
        added(old, write_documents(tmp_path / "new", 2, seed=5))
    assert str(more) in str(told.value)
    reads: list[Any] = []
    monkeypatch.setattr(verb, "seal_corpus", lambda *a, **k: reads.append(a))
    assert sum(added(old, more).documents.values()) == 9
    assert not reads  # tokens were sealed the first time


def test_one_that_was_begun_on_what_the_cache_was_begins_anew(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(old, more, monkeypatch)
    staged = shutil.copytree(old / ".staging/append", old.parent / "staged")
    gone = names(old, "train")[0]
    delete(old, [gone])
    assert not (old / ".staging").exists()
    shutil.copytree(staged, old / ".staging/append")
    added(old, more)
    assert verify(old, deep=True).faults == ()
    assert gone not in names(old, "train")
    assert len(Cache(old).attributes.corpus["appended"]) == 1


def test_new_blocks_that_were_damaged_meanwhile_are_not_added(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)

    def damaging(*arguments: Any, **named: Any) -> Any:
        done = extract(*arguments, **named)
        flip_byte(named["out"] / "train/embeddings/final/c/0/0")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(verb, "extract", damaging)
        with pytest.raises(CacheError, match=r"nothing was added. Type: rm -r (\S*), then") as told:
            added(old, more)
    assert contents(old) == before
    shutil.rmtree(str(told.value).split("rm -r ")[1].split(",")[0])
    assert sum(added(old, more).documents.values()) == 9


def without(content: Content, name: str) -> Content:
    return {key: value for key, value in content.items() if key[1] != name}


def test_it_can_be_deleted_merged_repaired_and_added_to(
    old: Path, olds: dict[str, Path], corpus: Path, more: Path, tiny_base: Path, tmp_path: Path
) -> None:
    added(old, more)
    gone = names(old, "train")[-1]
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
    carryon=CarryOnConfig(width=32, blocks=1), epochs=2, batch_tokens=256, lr=5e-3, samples=50
)


def test_training_reads_all_of_it_and_a_run_on_what_was_is_refused(
    old: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise StoppedError

    before = Cache(old).manifest.splits["train"].tokens
    with monkeypatch.context() as patch:
        patch.setattr("embedcache.train._Training._finish", stopped)
        with pytest.raises(StoppedError):
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


def test_info_says_what_was_added_and_when(old: Path, more: Path) -> None:
    assert describe(old)["appended"] == []
    told = added(old, more)
    (part,) = describe(old)["appended"]
    assert part["documents"] == told.documents
    assert part["tokens"] == told.tokens
    assert part["sources"] == [str(more)]
    assert part["at"].endswith("+00:00")


def test_the_hash_says_nothing_of_when(olds: dict[str, Path], more: Path, tmp_path: Path) -> None:
    caches = [shutil.copytree(olds["int8"], tmp_path / name) for name in ("one", "two")]
    for cache in caches:
        added(cache, more)
    assert comparable_tree(caches[0]) == comparable_tree(caches[1])
    assert Cache(caches[0]).manifest.hash == Cache(caches[1]).manifest.hash
