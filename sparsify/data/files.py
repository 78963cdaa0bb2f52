"""Rows of local text files: `.txt`, `.jsonl`, `.csv`, `.tsv`, `.parquet`."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
# STS-Benchmark's own files: genre, file, year, id, score, two sentences; no header.
STSB_POSITIONS = ("5", "6", "4")


def data_files(path: Path) -> list[Path]:
    """Data files that `path` means: itself, or those inside the folder, sorted by path.

    Raises:
        DataError: If there is none, or one is empty or of an unknown kind.
    """
    if not path.exists():
        raise DataError(
            f"data path {path} does not exist; give a file ({', '.join(SUFFIXES)}) or a folder of them"
        )
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"data folder {path} holds no file of the kinds {', '.join(SUFFIXES)}")
    elif path.suffix not in SUFFIXES:
        raise DataError(f"data file {path} is of an unknown kind; expected one of {', '.join(SUFFIXES)}")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"data file {file} is empty")
    return files


def read_file(file: Path, columns: Sequence[str] | None) -> Dataset:
    """Rows of one local file.

    Args:
        file: Path with one of `SUFFIXES`.
        columns: Columns wanted; numbers alone mean that a `.csv` or `.tsv` file has no header row.

    Raises:
        DataError: If it cannot be read as what its suffix says, or has no rows.
    """
    from datasets import Dataset

    try:
        if file.suffix == ".txt":
            return Dataset.from_dict({"text": [file.read_text(encoding="utf-8-sig")]})
        if file.suffix == ".parquet":
            from pyarrow import parquet

            table = Dataset(parquet.read_table(file))
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            table = Dataset.from_list(list(_json_rows(lines, file)))
        else:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                table = Dataset.from_dict(_separated(stream, columns, file))
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {file} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read data file {file}: {error}") from error
    if len(table) == 0:
        raise DataError(f"data file {file} has no rows")
    return table


def stream_file(file: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The rows of `read_file`, one after the other, without holding the file in memory (a `.txt` file is one row).

    Raises:
        DataError: As `read_file`, on the way.
    """
    try:
        if file.suffix == ".txt":
            yield {"text": file.read_text(encoding="utf-8-sig")}
        elif file.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif file.suffix == ".jsonl":
            yield from _json_rows(lines_of(file), file)
        else:
            yield from _stream_separated(lines_of(file, newline=""), columns, file)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read data file {file}: {error}") from error


def lines_of(file: Path, newline: str = "\n") -> Iterator[str]:
    """The lines of a text file, one after the other.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {file} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def _json_rows(lines: Iterable[str], file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def _stream_separated(
    lines: Iterator[str], columns: Sequence[str] | None, file: Path
) -> Iterator[dict[str, Any]]:
    """As `_separated`, row by row; without a header, columns are those of the first row."""
    rows, by_position = _separated_rows(lines, columns, file)
    header = None
    for number, row in enumerate(rows, 1):
        if header is None:
            header = [str(index) for index in range(len(row))] if by_position else row
            if not by_position:
                continue
        if len(row) < len(header) if by_position else len(row) != len(header):
            raise DataError(f"{file}, row {number}: {len(row)} fields, expected {len(header)}")
        yield dict(zip(header, row, strict=False))


def _separated_rows(
    stream: Iterable[str], columns: Sequence[str] | None, file: Path
) -> tuple[Iterator[list[str]], bool]:
    """The rows of comma- or tab-separated text, and whether there is no header among them."""
    lines = iter(stream)
    line = next(lines, "")
    tabs = file.suffix == ".tsv" or "\t" in line
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(chain([line], lines), delimiter="\t" if tabs else ",", quoting=quoting)
    rows = (row for row in reader if row)
    first = next(rows, None)
    if first is None:
        return iter(()), False
    by_position = _is_stsb(first) if columns is None else all(column.isdecimal() for column in columns)
    return chain([first], rows), by_position


def _separated(stream: Iterable[str], columns: Sequence[str] | None, file: Path) -> dict[str, list[str]]:
    """Columns of comma- or tab-separated text: named by its header, or by position ("0", "1", ...) without one."""
    some, by_position = _separated_rows(stream, columns, file)
    rows = list(some)
    if not rows:
        return {}
    # Only what every row has can be a column: STS-Benchmark's rows end in a varying number of notes.
    width = min(map(len, rows))
    if by_position:
        return {str(index): [row[index] for row in rows] for index in range(width)}
    header = rows.pop(0)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(f"{file}, row {number}: {len(row)} fields, but the header names {len(header)}")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def _is_stsb(row: Sequence[str]) -> bool:
    """Whether a first row is data of STS-Benchmark's layout rather than a header."""
    return len(row) >= 7 and re.fullmatch(r"[0-5](\.\d+)?", row[4]) is not None
