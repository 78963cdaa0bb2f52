"""Rows of a data source, local files or a `datasets` name, whole or one by one, and the columns that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsify.data.files import STSB_POSITIONS, data_files, read_file, stream_file
from sparsify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = (("text",), ("sentence",), ("content",))
PAIR_COLUMNS = (("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "label"))
LABEL_COLUMNS = (("text", "label"), ("sentence", "label"))
TARGET_COLUMNS = (("source", "target"), ("input", "target"), ("text", "summary"), ("question", "answer"))


class Source(Protocol):
    """What the functions that read data need to know; a recipe's data section has the same attributes."""

    @property
    def path(self) -> str | Path | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def columns(self) -> Sequence[str] | None: ...
    @property
    def length(self) -> int: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def stream(self) -> bool: ...


def title(spec: Source) -> str:
    """What to call the source in a message."""
    return str(spec.path if spec.path is not None else spec.name)


def read_table(spec: Source) -> Dataset:
    """All rows of the source, in file order; a `.txt` file is one row with the column `text`.

    Raises:
        DataError: If the source is missing, empty, unreadable, or its files have different columns.
    """
    from datasets import concatenate_datasets

    if spec.path is None:
        table = _load_named(spec)
        if len(table) == 0:
            raise DataError(f"data set {spec.name!r}, split {spec.split!r}, has no rows")
        return table
    files = data_files(Path(spec.path))
    tables = [read_file(file, spec.columns) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise DataError(
                f"files of {spec.path} differ in their columns: {files[0].name} has {tables[0].column_names}, "
                f"{file.name} has {table.column_names}; give one kind of file"
            )
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise DataError(f"files of {spec.path} differ in the types of their columns: {error}") from error


def _load_named(spec: Source, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(str(spec.name), spec.config, split=spec.split, **options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot load data set {spec.name!r}, split {spec.split!r}: {reason[0]}") from error


def columns_of(spec: Source, usual: Sequence[tuple[str, ...]], meaning: str) -> list[list[Any]]:
    """Values of the columns that the spec names, or else of the first of the usual ones that are there.

    Args:
        spec: The source. A column of a table inside the table is named with a dot, such as `translation.de`.
        usual: Sets of columns to look for.
        meaning: What they are, for a message.

    Raises:
        DataError: If the source cannot be read or lacks a column.
    """
    table = read_table(spec)
    inner = {
        f"{name}.{key}": (name, key)
        for name, feature in table.features.items()
        if isinstance(feature, dict)
        for key in feature
    }
    names = chosen_columns(spec, [*table.column_names, *inner], usual, meaning)

    def values(name: str) -> list[Any]:
        if name in table.column_names:
            return list(table[name])
        outer, key = inner[name]
        return [cell[key] for cell in table[outer]]

    return [values(name) for name in names]


def rows_of(spec: Source, usual: Sequence[tuple[str, ...]], meaning: str) -> Iterator[tuple[Any, ...]]:
    """The values that `columns_of` gives, row by row; streamed if the spec says so.

    Raises:
        DataError: As `columns_of`, perhaps on the way.
    """
    if spec.stream:
        return stream_rows(spec, usual, meaning)
    return zip(*columns_of(spec, usual, meaning), strict=True)


def stream_rows(spec: Source, usual: Sequence[tuple[str, ...]], meaning: str) -> Iterator[tuple[Any, ...]]:
    """The values that `columns_of` gives, row by row, without holding more than a few rows in memory.

    Raises:
        DataError: As `columns_of`, on the way.
    """
    rows: Iterator[Mapping[str, Any]]
    if spec.path is None:
        rows = iter(_load_named(spec, streaming=True))
    else:
        rows = (row for file in data_files(Path(spec.path)) for row in stream_file(file, spec.columns))
    names: tuple[str, ...] | None = None
    for row in rows:
        if names is None or any(name.split(".")[0] not in row for name in names):
            present = [
                *row,
                *(f"{key}.{inner}" for key in row if isinstance(row[key], dict) for inner in row[key]),
            ]
            names = chosen_columns(spec, present, usual, meaning)
        yield tuple(row[name] if name in row else _inside(row, name) for name in names)


def _inside(row: Mapping[str, Any], name: str) -> Any:
    key, _, inner = name.partition(".")
    return row[key][inner]


def chosen_columns(
    spec: Source, present: Sequence[str], usual: Sequence[tuple[str, ...]], meaning: str
) -> tuple[str, ...]:
    """The columns that the spec names, or else the first of the usual sets that is there.

    Raises:
        DataError: If one is missing.
    """
    wanted = _usual(present, usual) if spec.columns is None else tuple(spec.columns)
    if wanted is None:
        fault = f"found no {meaning}"
    elif spec.columns is not None and len(wanted) != len(usual[0]):
        fault = f"`columns` names {len(wanted)}; expected {len(usual[0])}: {meaning}"
    elif missing := [name for name in wanted if name not in present]:
        fault = f"has no column {', '.join(missing)}"
    else:
        return wanted
    raise DataError(f"{title(spec)}: {fault}; its columns are {', '.join(present)}. Set `columns`")


def _usual(present: Sequence[str], usual: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The first usual set of columns that is present; a lone column is taken for the text."""
    if PAIR_COLUMNS[0] in usual and set(STSB_POSITIONS) <= set(present):
        return STSB_POSITIONS
    if TEXT_COLUMNS[0] in usual and len(present) == 1:
        return (present[0],)
    return next((names for names in usual if set(names) <= set(present)), None)


def text_of(value: Any, row: int, spec: Source, *, blank: bool = False) -> str:
    """A cell that must be text; `row` counts from 0.

    Raises:
        DataError: If it is none, or blank where that is not allowed.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{title(spec)}, row {row + 1}: expected text, got {type(value).__name__}; set `columns`"
        )
    if not blank and not value.strip():
        raise DataError(f"{title(spec)}, row {row + 1}: the text is empty; leave the row out")
    return value


def number_of(value: Any, row: int, spec: Source) -> float:
    """A cell that must be a number; `row` counts from 0.

    Raises:
        DataError: If it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{title(spec)}, row {row + 1}: score {value!r} is not a number") from error
