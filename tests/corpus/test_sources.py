"""Files, folders, patterns and the standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.sources.folders import LEFT_OUT
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.errors import CorpusError


def names(*sources: str | Path, **settings: Any) -> list[str]:
    config = CorpusConfig(sources=tuple(map(str, sources)), **settings)
    return [document.label for document in iterate_documents(config.sources, config)]


def make(write: Any, files: Iterable[str]) -> None:
    for name in files:
        write(name, "some text")


def test_a_folder_is_read_recursively_in_order(write: Any, tmp_path: Path) -> None:
    make(write, ["b.txt", "a/z.py", "a/b/c.md", "README", ".git/config.txt", "a/.x.txt", "i.png"])
    write("c.jsonl", [{"text": "one"}, {"text": "two"}])
    expected = ["README", "a/b/c.md", "a/z.py", "b.txt", "c.jsonl:1", "c.jsonl:2"]
    assert names(tmp_path) == expected


def test_linked_folders_are_not_followed(write: Any, tmp_path: Path) -> None:
    make(write, ["a/b.txt"])
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["a/b.txt"]


def test_a_pattern(write: Any, tmp_path: Path) -> None:
    make(write, ["docs/a.md", "docs/x/b.md", "docs/x/c.txt"])
    assert names(tmp_path / "docs/**/*.md") == ["a.md", "x/b.md"]
    with pytest.raises(CorpusError, match=r"match this pattern.*quote"):
        names(tmp_path / "docs/*.rst")


def test_a_file_whose_name_looks_like_a_pattern(write: Any) -> None:
    assert names(write("a[1].txt", "text")) == ["a[1].txt"]


def test_a_missing_path_names_its_sibling(write: Any, tmp_path: Path) -> None:
    make(write, ["corpus.txt"])
    with pytest.raises(CorpusError, match=r"corpsu\.txt.*Did you mean 'corpus\.txt'"):
        names(tmp_path / "corpsu.txt")
    with pytest.raises(CorpusError, match="give hf:org/nothing"):
        names("org/nothing")


def test_a_folder_without_text_lists_what_it_has(write: Any, tmp_path: Path) -> None:
    make(write, ["a.png", "b.png", "c.bin"])
    with pytest.raises(CorpusError, match=r"\.png \(2\), \.bin \(1\)"):
        names(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no files"):
        names(tmp_path / "empty")


def test_a_compressed_file_is_refused(write: Any) -> None:
    with pytest.raises(CorpusError, match="Unpack"):
        names(write("a.jsonl.gz", b"\x1f\x8b"))


def test_the_standard_library() -> None:
    found = names("stdlib:")
    root = Path(sysconfig.get_path("stdlib"))
    expected = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts[:-1])
    }
    assert set(found) == expected
    assert len(found) == len(expected)
    assert "asyncio/base_events.py" in expected
    # The order is spread over the library: its first tenth has files of many first letters.
    assert len({name[0] for name in found[: len(found) // 10]}) > 8
    assert found == names("stdlib:")


def test_a_python_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match="stdlib: expected"):
        names("stdlib:")


def test_sources_are_read_in_the_order_given(write: Any, tmp_path: Path) -> None:
    make(write, ["b/one.txt", "a/two.txt"])
    assert names(tmp_path / "b", tmp_path / "a") == ["one.txt", "two.txt"]


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    try:
        (tmp_path / "f\udcff.txt").write_text("text")
    except OSError:
        pytest.skip("this file system wants names that are text")
    [name] = names(tmp_path)
    assert name.encode() == rb"f\xff.txt"
