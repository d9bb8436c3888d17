"""Text files: encodings, and large files in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary, Document
from embedcache.corpus.sources import text_files
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.errors import CorpusError

BAD = "ein Käfer".encode("latin-1")


def read(path: Path, **settings: Any) -> list[Document]:
    return list(iterate_documents([str(path)], CorpusConfig(sources=(str(path),), **settings)))


def test_a_file_is_a_document_with_its_bytes_as_they_are(write: Any) -> None:
    [document] = read(write("a.log", "one\r\ntwo 😀\n"))
    assert (document.label, document.text, document.closed) == ("a.log", "one\r\ntwo 😀\n", True)
    assert all(segment.target for segment in document.segments)


def test_a_byte_order_mark_is_removed(write: Any) -> None:
    [document] = read(write("a.txt", b"\xef\xbb\xbfhello"))
    assert document.text == "hello"


def test_another_encoding(write: Any) -> None:
    assert read(write("a.txt", BAD), encoding="latin-1")[0].text == "ein Käfer"


def test_undecodable_bytes_are_named_with_the_settings(write: Any) -> None:
    with pytest.raises(CorpusError, match=r"a\.txt: .*byte 5.*`encoding=`.*latin-1.*skip"):
        read(write("a.txt", BAD))


def test_undecodable_files_can_be_skipped_and_are_counted(write: Any, tmp_path: Path) -> None:
    write("a.txt", BAD)
    write("b.txt", "fine")
    config = CorpusConfig(sources=(str(tmp_path),), undecodable="skip")
    summary = CorpusSummary()
    documents = iterate_documents(config.sources, config, summary=summary)
    assert [document.name for document in documents] == ["b.txt"]
    assert (summary.skipped_undecodable, summary.files) == (1, 2)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(lines=st.lists(st.text("aé日😀 ", max_size=30), max_size=30), size=st.integers(5, 60))
def test_parts_join_to_the_file(
    write: Any, monkeypatch: pytest.MonkeyPatch, lines: list[str], size: int
) -> None:
    monkeypatch.setattr(text_files, "WHOLE_BYTES", size)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", size)
    content = "\n".join(lines)
    parts = read(write("big.txt", content))
    assert "".join(part.text for part in parts) == content
    assert all(len(part.text) <= size for part in parts)
    assert [part.closed for part in parts] == [False] * (len(parts) - 1) + [True]
    if len(content.encode()) > size:
        names = [f"big.txt#{number}" for number in range(1, len(parts) + 1)]
        assert [part.label for part in parts] == names
    for part in parts[:-1]:
        assert part.text.endswith("\n") or ("\n" not in part.text and len(part.text) == size)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_blocks_do_not_break_characters(
    write: Any, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("embedcache.corpus.encoding.BLOCK_BYTES", 7)
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 20)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 20)
    content = "日本語 text\n😀 and more\n" * 10
    parts = read(write("big.txt", content.encode(encoding)), encoding=encoding)
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == content


def test_a_bad_byte_far_into_a_large_file(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.corpus.encoding.BLOCK_BYTES", 7)
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 20)
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 20)
    start = ("日" * 40 + "\n").encode()
    path = write("big.txt", start + b"\xff rest")
    with pytest.raises(CorpusError, match=rf"byte {len(start)}\."):
        read(path)
    assert read(path, undecodable="skip") == []
