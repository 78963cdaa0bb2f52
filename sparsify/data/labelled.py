"""Rows of texts with what a model is to say about them: a class, a score of likeness, another text.

A source is read whole, or row by row where it says `stream`; either way rows come in file order, and every fault is
told with the row it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.data.files import data_files, lines_of
from sparsify.data.labels import Classes
from sparsify.data.tables import (
    LABEL_COLUMNS,
    PAIR_COLUMNS,
    TARGET_COLUMNS,
    TEXT_COLUMNS,
    Source,
    number_of,
    rows_of,
    text_of,
    title,
)
from sparsify.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
# Texts that go through the tokenizer together.
TOGETHER = 64


def pair_rows(spec: Source) -> Iterator[Row]:
    """`sentence1`, `sentence2` (str) and `score` (float, higher = more alike)."""
    rows = islice(rows_of(spec, PAIR_COLUMNS, "columns of two sentences and a score"), spec.samples)
    for row, (first, second, score) in enumerate(rows):
        yield {
            "sentence1": text_of(first, row, spec),
            "sentence2": text_of(second, row, spec),
            "score": number_of(score, row, spec),
        }


def sentence_rows(spec: Source) -> Iterator[Row]:
    """`text` (str): lines of `.txt` files, cells of a column, or both sentences of pairs; blank ones are left out.

    Raises:
        DataError: If the source has none, or a cell is no text.
    """
    found = False
    for text in islice(_sentences(spec), spec.samples):
        found = True
        yield {"text": text}
    if not found:
        raise DataError(f"{title(spec)} holds no sentence: all its texts are empty")


def _sentences(spec: Source) -> Iterator[str]:
    files = data_files(Path(spec.path)) if spec.path is not None else []
    if files and all(file.suffix == ".txt" for file in files):
        cells: Iterator[Any] = (line for file in files for line in lines_of(file))
    else:
        usual = (*PAIR_COLUMNS, *TEXT_COLUMNS) if spec.columns is None else (tuple(spec.columns),)
        meaning = "column of sentences"
        cells = (cell for row in rows_of(spec, usual, meaning) for cell in row[:2])  # a third one is a score
    for row, cell in enumerate(cells):
        text = text_of(cell, row, spec, blank=True).strip()
        if text:
            yield text


def label_rows(spec: Source, label2id: Mapping[str, int] | None) -> Iterator[Row]:
    """`text` (str) and `label` (int); see `sparsify.data.labels` for labels that are words."""
    rows = islice(rows_of(spec, LABEL_COLUMNS, "columns of texts and labels"), spec.samples)
    names = None
    if not spec.stream:
        table = list(rows)
        rows, names = iter(table), [label for _, label in table]
    classes = Classes(label2id, names, spec)
    for row, (text, label) in enumerate(rows):
        yield {"text": text_of(text, row, spec), "label": classes(label, row)}


def class_token_rows(
    spec: Source, tokenizer: PreTrainedTokenizerBase, label2id: Mapping[str, int] | None
) -> Iterator[Row]:
    """`input_ids`, `attention_mask` (lists, at most `length` long) and `labels` (int)."""
    rows = label_rows(spec, label2id)
    while some := list(islice(rows, TOGETHER)):
        encoded = tokenizer([row["text"] for row in some], truncation=True, max_length=spec.length)
        for index, row in enumerate(some):
            yield {
                "input_ids": encoded["input_ids"][index],
                "attention_mask": encoded["attention_mask"][index],
                "labels": row["label"],
            }


def target_rows(spec: Source) -> Iterator[Row]:
    """`source` and `target` (str): what an encoder reads and what its decoder is to write."""
    rows = islice(rows_of(spec, TARGET_COLUMNS, "columns of texts and their targets"), spec.samples)
    for row, (source, target) in enumerate(rows):
        yield {"source": text_of(source, row, spec), "target": text_of(target, row, spec)}


def target_token_rows(spec: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """`input_ids`, `attention_mask` and `labels` (lists, each at most `length` long)."""
    rows = target_rows(spec)
    while some := list(islice(rows, TOGETHER)):
        options = {"truncation": True, "max_length": spec.length}
        encoded = tokenizer([row["source"] for row in some], **options)
        targets = tokenizer(text_target=[row["target"] for row in some], **options)
        for index in range(len(some)):
            yield {
                "input_ids": encoded["input_ids"][index],
                "attention_mask": encoded["attention_mask"][index],
                "labels": targets["input_ids"][index],
            }
