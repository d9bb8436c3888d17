"""Read files of records one record at a time: JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.corpus.config import CorpusConfig
from embedcache.corpus.documents import CorpusSummary
from embedcache.corpus.encoding import UndecodableError, decode
from embedcache.errors import CorpusError

Record = Mapping[str, Any]
PARQUET_ROWS = 256
FIELD_CHARACTERS = 1 << 30


def file_records(
    path: Path, config: CorpusConfig, summary: CorpusSummary
) -> Iterator[tuple[int, Record]]:
    """Yield the records of a file, each with its line number (Parquet: row number) from 1.

    Raises:
        CorpusError: a line is not a record. The message names the file and the line.
    """
    summary.files += 1
    if path.suffix.lower() == ".parquet":
        return _parquet_records(path)
    lines = _lines(path, config, summary)
    return (
        _csv_records(path, lines) if path.suffix.lower() == ".csv" else _json_records(path, lines)
    )


def _lines(path: Path, config: CorpusConfig, summary: CorpusSummary) -> Iterator[tuple[int, str]]:
    if "\n".encode(config.encoding) != b"\n":
        raise CorpusError(
            f"{path}: expected records in an encoding whose line end is one byte, found "
            f"{config.encoding}. Convert the file to UTF-8 (iconv -t utf-8)."
        )
    position = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                text = decode(data, config.encoding, f"{path}:{number}", start=position)
            except UndecodableError:
                if config.undecodable == "error":
                    raise
                summary.skipped_undecodable += 1
            else:
                yield number, text
            position += len(data)


def _json_records(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"{path}:{number}: expected a JSON object on each line, found malformed JSON "
                f"({error}). Correct or remove line {number}."
            ) from error
        if not isinstance(record, dict):
            raise CorpusError(
                f'{path}:{number}: expected a JSON object such as {{"text": …}}, '
                f"found {type(record).__name__}."
            )
        yield number, record


def _csv_records(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    # Python's limit of 128 KiB a field is smaller than many texts. It is global to the process.
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_CHARACTERS))
    reader = csv.reader((line for _, line in lines), strict=True)
    number = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        while True:
            number = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                raise CorpusError(
                    f"{path}:{number}: expected {len(header)} columns ({', '.join(header)}), "
                    f"found {len(row)}. Quote fields that hold commas or line ends."
                )
            yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise CorpusError(
            f"{path}:{number}: expected comma-separated values, found a malformed row "
            f"({error}). Correct the quotes on line {number}."
        ) from error


def _parquet_records(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        from pyarrow import lib, parquet
    except ImportError as error:
        raise CorpusError(
            f"{path}: reading Parquet needs pyarrow. Run: pip install 'embedcache[data]'"
        ) from error
    try:
        open_file: Any = parquet.ParquetFile  # pyarrow has no types
        with open_file(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except lib.ArrowException as error:
        raise CorpusError(f"{path}: expected a Parquet file, found: {error}.") from error
