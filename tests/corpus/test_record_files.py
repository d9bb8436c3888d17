"""JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary, Document
from embedcache.corpus.sources.iterate import iterate_documents
from embedcache.errors import CorpusError


def read(path: Path, summary: CorpusSummary | None = None, **settings: Any) -> list[Document]:
    config = CorpusConfig(sources=(str(path),), **settings)
    return list(iterate_documents([str(path)], config, summary=summary))


def test_json_lines_are_named_by_line(write: Any) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert [(d.label, d.text) for d in read(path)] == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": ', "malformed JSON"), ('["text"]', "JSON object"), ('{"text": 3}', "found int")],
)
def test_a_bad_line_is_named(write: Any, line: str, message: str) -> None:
    path = write("a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=rf"a\.jsonl:2: .*{message}"):
        read(path)


def test_an_undecodable_line(write: Any) -> None:
    path = write("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n{"text": "three"}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:2.*byte 26"):
        read(path)
    summary = CorpusSummary()
    found = read(path, summary, undecodable="skip")
    assert [document.label for document in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert summary.skipped_undecodable == 1


def test_records_in_utf_16_are_refused(write: Any) -> None:
    with pytest.raises(CorpusError, match="Convert the file"):
        read(write("a.jsonl", b""), encoding="utf-16")


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=20)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8))
def test_csv_written_by_python_is_read(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows(rows)
    found = [tuple(segment.text for segment in document.segments) for document in read(path)]
    assert found == rows


def test_csv_records_are_named_by_their_first_line(write: Any) -> None:
    path = write("a.csv", 'text,n\n"two\nlines",1\nshort,2\n')
    assert [(d.label, d.text) for d in read(path)] == [
        ("a.csv:2", "two\nlines"),
        ("a.csv:4", "short"),
    ]


def test_csv_with_a_long_field(write: Any) -> None:
    [document] = read(write("a.csv", "text\n" + "x" * 200_000 + "\n"))
    assert len(document.text) == 200_000


def test_malformed_csv_is_refused(write: Any) -> None:
    with pytest.raises(CorpusError, match=r"a\.csv:3: expected 2 columns \(text, n\), found 3"):
        read(write("a.csv", "text,n\nx,1\nx,y,2\n"))
    with pytest.raises(CorpusError, match=r"a\.csv:2: expected comma-separated"):
        read(write("a.csv", 'text\n"never closed\n'))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(600)]
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(600))}), path)
    found = read(path)
    assert [document.text for document in found] == texts
    assert found[599].label == "a.parquet:600"


def test_malformed_parquet_is_refused(write: Any) -> None:
    with pytest.raises(CorpusError, match="expected a Parquet file"):
        read(write("a.parquet", b"PAR1 no"))


def test_parquet_without_pyarrow(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match=r"pip install 'embedcache\[data\]'"):
        read(write("a.parquet", b""))
