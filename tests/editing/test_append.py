"""An append gives the cache that one extraction of all documents gives."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support.cache_contents import contents, names
from support.digest_tables import files_of, put_aside, quarantined
from support.fixtures_append import added, every_byte, extracted
from support.fixtures_extract import corpus_config, flip_byte, write_documents

import embedcache.editing.append as verb
from embedcache.cache.blocks.commit import BlockWriter
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import ATTRIBUTE, SPLITS, block_shards
from embedcache.cache.manifest import digest_table
from embedcache.cache.manifest.file_record import FILE
from embedcache.cache.verify import verify
from embedcache.corpus.config import CorpusConfig
from embedcache.editing.append import AppendSummary, corpus_like
from embedcache.editing.delete import delete
from embedcache.extraction.extract import extract
from embedcache.info import describe


@pytest.fixture(scope="session")
def both(
    tiny_base: Path, corpus: Path, more: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One extraction of ``corpus`` and ``more``: int8."""
    return extracted(
        tmp_path_factory.mktemp("both") / "cache", tiny_base, corpus, more, codec="int8"
    )


def test_the_cache_is_that_of_one_extraction(
    olds: dict[str, Path], appended: tuple[Path, AppendSummary], both: Path, grown: Path
) -> None:
    cache, summary = appended
    assert contents(cache) == contents(both)
    assert verify(cache, deep=True).faults == ()
    old, new = Cache(olds["int8"]).manifest, Cache(cache).manifest
    for name in SPLITS:
        split, before = new.splits[name], old.splits[name]
        assert files_of(cache, name)[: before.blocks] == files_of(olds["int8"], name)
        for key in ("documents", "sequences", "tokens"):
            assert getattr(split, key) == getattr(before, key) + getattr(summary, key)[name]
        assert split.tokens == Cache(both).manifest.splits[name].tokens
    bytes_before, bytes_after = every_byte(olds["int8"]), every_byte(cache)
    changed = {path for path, data in bytes_before.items() if bytes_after.get(path) != data}
    tables = ("offsets", "document/", "tokens/blocks", "documents/", "zarr.json")
    assert all(
        path in ("manifest.json", "tokens.json")
        or path.startswith("digests/")
        or any(table in path for table in tables)
        for path in changed
    ), changed
    # The digest tables cover the old chunks and the new ones.
    for path in ("train/tokens/ids/c/0", f"train/tokens/span/c/{old.splits['train'].blocks}/0"):
        flip_byte(grown / path)
        assert [fault.file for fault in verify(grown).faults] == [path]
        flip_byte(grown / path)


def test_new_documents_are_coded_with_the_calibration_of_the_cache(
    olds: dict[str, Path], both: Path, more: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(olds["transform"], tmp_path / "cache")
    before = every_byte(cache)
    added(cache, more)
    after = every_byte(cache)
    shared = [path for path in before if path.startswith(("codec/", "base/"))]
    assert shared
    assert all(after[path] == before[path] for path in shared)
    assert verify(cache, deep=True).faults == ()
    reference, found = contents(both), contents(cache)
    assert found.keys() == reference.keys()
    known = contents(olds["transform"]).keys()

    def error(keys: list[Any]) -> float:
        """Return the mean square error of the codec, relative to the mean square."""
        x, y = (
            np.concatenate([np.frombuffer(of[key]["final"], np.float32) for key in keys])
            for of in (reference, found)
        )
        return float(((x - y) ** 2).mean() / (x**2).mean())

    train = [key for key in found if key[0] == "train"]
    old, new = (error([k for k in train if (k in known) == is_old]) for is_old in (True, False))
    assert 0 < new < 2 * old < 1


def test_documents_of_the_cache_are_passed_over_whatever_their_names(
    old: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = write_documents(tmp_path / "new", 2, seed=5)
    (folder / "copy.txt").write_bytes((corpus / "003.txt").read_bytes())
    # A limit counts the documents that are read, not those that are new.
    for count, known in ((1, 0), (0, 1)):
        summary = added(str(old), str(folder), limit_documents=1)
        assert (sum(summary.documents.values()), summary.already_there) == (count, known)
    summary = added(old, folder)
    assert (sum(summary.documents.values()), summary.already_there) == (1, 2)
    found = {name for split in SPLITS for name in names(old, split)}
    assert {"000.txt", "000.txt@2", "001.txt@2"} <= found
    assert "copy.txt" not in found


def test_a_dry_run_returns_the_same_counts_and_a_second_append_adds_nothing(
    old: Path, appended: tuple[Path, AppendSummary], grown: Path, more: Path
) -> None:
    cache, done = appended
    before = every_byte(old)
    assert describe(old)["appended"] == []
    planned = added(old, more, dry_run=True)
    assert every_byte(old) == before
    assert planned.dry_run and planned.bytes > 0
    assert (sum(done.documents.values()), done.already_there) == (9, 0)
    same = ("documents", "sequences", "tokens", "already_there", "elsewhere")
    assert [getattr(planned, key) for key in same] == [getattr(done, key) for key in same]
    before = every_byte(grown)
    again = added(grown, more)
    assert (sum(again.documents.values()), again.already_there) == (0, 9)
    assert every_byte(grown) == before
    assert not (cache / ".staging").exists()
    (part,) = describe(cache)["appended"]
    assert [part[key] for key in ("documents", "tokens")] == [done.documents, done.tokens]
    assert part["sources"] == [str(more)]
    assert part["at"].endswith("+00:00")


@pytest.mark.parametrize("way", ["by fraction", "by source", "by list"])
def test_near_duplicates_go_to_the_split_of_the_original(
    old: Path, corpus: Path, tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / f"edited-{path.name}").write_text(path.read_text() + " and the lazy fox")
    places = {name: split for split in SPLITS for name in names(old, split)}
    assert {*places.values()} == {*SPLITS}
    if way == "by fraction":
        summary = added(old, folder, dev_fraction=0.45, test_fraction=0.45)
        found = {name: split for split in SPLITS for name in names(old, split)}
        assert {name: found[f"edited-{name}"] for name in places} == places
        assert summary.elsewhere == 0
        return
    expected, asked = Counter(places.values()), "dev"
    if way == "by source":
        others, asked = write_documents(tmp_path / "others", 3, seed=7), "test"
        given: dict[str, Any] = {"test_sources": (str(folder),)}
        summary = added(old, others, dry_run=True, **given, dev_fraction=0, test_fraction=0)
        expected["train"] += 3
    else:
        listed = tmp_path / "list.json"
        listed.write_text(json.dumps({"dev": [f"edited-{name}" for name in places]}))
        summary = added(old, folder, dry_run=True, split_file=str(listed))
    assert summary.documents == dict(expected)
    assert summary.elsewhere == sum(split != asked for split in places.values())


def test_splits_are_given_as_for_an_extraction(old: Path, more: Path, tmp_path: Path) -> None:
    held_out = write_documents(tmp_path / "held", 4, seed=8)
    summary = added(old, more, test_sources=(str(held_out),), dev_fraction=0.0)
    assert summary.documents == {"train": 9, "dev": 0, "test": 4}
    again = added(old, held_out, dry_run=True)
    assert (again.already_there, again.documents["train"]) == (4, 0)
    new = write_documents(tmp_path / "all", 5, seed=9)
    summary = added(old, new, dev_fraction=0, test_fraction=0, dry_run=True)
    assert summary.documents == {"train": 5, "dev": 0, "test": 0}


def test_the_new_lines_of_a_log_go_to_its_split(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.corpus.sources.text_files.WHOLE_BYTES", 400)
    monkeypatch.setattr("embedcache.corpus.sources.text_files.PART_CHARACTERS", 200)
    log = tmp_path / "log.txt"
    lines = [f"line {number} says the quick brown fox jumps {number**3}\n" for number in range(40)]
    log.write_text("".join(lines[:20]))
    first = added(old, log)
    log.write_text("".join(lines))
    second = added(old, log, dry_run=True)
    assert second.already_there == sum(first.documents.values()) - 1  # the last piece has grown
    assert sum(second.documents.values()) > 0
    (split,) = (name for name, count in first.documents.items() if count)
    assert [name for name, count in second.documents.items() if count] == [split]


@pytest.mark.parametrize("listed", [False, True])
def test_settings_that_are_not_given_are_those_of_the_cache(old: Path, listed: bool) -> None:
    splits: dict[str, Any] = {"dev_sources": ("test",), "test_fraction": 0.3}
    if listed:
        splits = {"split_file": "list.json"}
    first = CorpusConfig(
        sources=("train.jsonl",),
        context=64,
        prompt="{q}? ",
        completion="{a}",
        min_tokens=3,
        split_seed=7,
        limit_documents=2,
        **splits,
    )
    root = zarr.open_group(old, mode="r+")
    attributes: Any = root.attrs[ATTRIBUTE]
    attributes["corpus"]["config"] = first.to_dict()
    root.attrs[ATTRIBUTE] = attributes
    config = corpus_like(old, "more")
    assert (config.prompt, config.completion, config.min_tokens) == ("{q}? ", "{a}", 3)
    assert (config.context, config.split_seed, config.limit_documents) == (64, 7, None)
    assert config.split_file is None and config.dev_sources == ()
    # Dev was a source of its own, or all documents were listed: none of the new ones is dev.
    assert config.fractions == ((0.0, 0.0) if listed else (0.0, 0.3))
    other = corpus_like(old, ["a", "b"], text_field="a", dev_fraction=0.5)
    assert other.sources == ("a", "b")
    assert (other.prompt, other.text_field, other.dev_fraction) == (None, "a", 0.5)


def test_tables_of_many_pages_and_chunks_grow_and_shrink(
    tiny_base: Path, corpus: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_table, "PAGE", 3)
    for module in ("tables", "reader"):
        monkeypatch.setattr(f"embedcache.cache.tokens.{module}.TABLE_CHUNK", 3)
    cache = extracted(tmp_path / "cache", tiny_base, corpus)
    settings = Cache(cache).attributes.settings

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

    def digest_rows() -> list[tuple[int, int, bytes]]:
        """Return the records of the shards of train, read from the file by numpy alone."""
        count = Cache(cache).manifest.splits["train"].embeddings.rows
        return np.frombuffer(
            (cache / "digests/train/embeddings").read_bytes(), FILE, count
        ).tolist()

    before, rows, earlier = chunks(), digest_rows(), contents(cache)
    added(cache, more)
    assert chunks()["tokens/offsets"] > before["tokens/offsets"] > 1
    new_rows, blocks = digest_rows(), Cache(cache).manifest.splits["train"].blocks
    assert len(new_rows) > len(rows) > 3
    assert new_rows[: len(rows)] == rows
    paths = [path for block in range(blocks) for path in block_shards("train", block, settings)]
    for (size, _, digest), path in zip(new_rows, paths, strict=True):
        data = (cache / path).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).digest())
    delete(cache, sorted({name for _, name, _ in contents(cache).keys() - earlier.keys()}))
    assert chunks() | {"tokens/blocks": 0} == before | {"tokens/blocks": 0}  # blocks stay
    assert contents(cache) == earlier


def quarantine(cache: Path, block: int, sequence: int) -> None:
    """Quarantine a train sequence of a finished cache, in its marker and in the digest tables."""
    writer = BlockWriter(cache)
    files = files_of(cache, "train")[block]
    writer.renew("train", block, files, quarantined=(sequence,), generation=1)
    writer.close()
    put_aside(cache, "train", block, (sequence,))


def test_quarantined_sequences_stay_quarantined_in_old_and_new_blocks(
    old: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Cache(old).manifest.splits["train"]
    last = before.sequences - 1
    quarantine(old, before.blocks - 1, last)

    def quarantining(*arguments: Any, **named: Any) -> Any:
        done = extract(*arguments, **named)
        quarantine(named["out"], 0, 1)
        return done

    monkeypatch.setattr(verb, "extract", quarantining)
    verb.append(old, corpus_config(more), device="cpu")
    assert quarantined(old, "train") == (last, before.sequences + 1)
    assert verify(old, deep=True).faults == ()
