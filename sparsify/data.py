"""Text for calibration, training and evaluation: local files or a `datasets` name, tokenised and packed.

One `DataSpec` says where the text is and how it is cut. What comes out is a `datasets.Dataset` in a fixed order:

    causal_blocks           packed blocks of tokens for a causal language model
    masked_blocks           packed blocks framed by the tokenizer's special tokens, for a masked language model
    classification_samples  tokenised texts with a class label
    sentence_pairs          two sentences and a score

Local files may be `.txt` (one document a file), `.jsonl`, `.csv`, `.tsv` or `.parquet` (one row an example), alone or
in a folder, which is read in the order of the file names. Tab-separated text is taken as it stands, without quoting.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from sparsify.data_files import STSB_POSITIONS, SUFFIXES, data_files, read_file
from sparsify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = (("text",), ("sentence",), ("content",))
PAIR_COLUMNS = (("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "label"))
LABEL_COLUMNS = (("text", "label"), ("sentence", "label"))
# A tokenizer's time and memory grow with the string: long documents go in by pieces of about this many characters.
PIECE = 1 << 16


class Source(Protocol):
    """What the functions of this module need to know; a recipe's data section has the same attributes."""

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


@dataclass(frozen=True)
class DataSpec:
    """Where text is and how it is cut into samples. Exactly one of `path` and `name` is set.

    Attributes:
        path: File or folder on this machine.
        name: Name of a data set for `datasets.load_dataset`.
        config: Configuration of that data set.
        split: Split of that data set; the library's slices such as `train[:5%]` work. Local files have none.
        columns: Columns to read: one for text, `(text, label)` for classification, `(first, second, score)` for
            pairs. Numbers are positions, from 0, in a `.csv` or `.tsv` file without a header row. None takes the
            usual names (`text`; `text`, `label`; `sentence1`, `sentence2`, `score`).
        length: Tokens per sample.
        samples: Most samples to take, from the front; None takes all.

    Raises:
        DataError: If neither or both of `path` and `name` are set, or a number is not positive.
    """

    path: str | Path | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    columns: tuple[str, ...] | None = None
    length: int = 512
    samples: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.name is None):
            raise DataError(
                "data needs one of `path` (a local file or folder) and `name` (a datasets name), not both"
            )
        if self.columns is not None:
            columns = (self.columns,) if isinstance(self.columns, str | int) else self.columns
            object.__setattr__(self, "columns", tuple(str(column) for column in columns))
        for key in ("length", "samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise DataError(f"data `{key}` is {value}; it must be at least 1")

    @classmethod
    def parse(cls, text: str | Path, **settings: Any) -> DataSpec:
        """Reads a command-line value: a path if it exists or ends like a data file, else a `datasets` name.

        A name may carry its configuration after a colon: `wikitext:wikitext-2-raw-v1`.
        """
        path = Path(text)
        if path.exists() or path.suffix in SUFFIXES or path.is_absolute():
            return cls(path=path, **settings)
        name, _, config = str(text).partition(":")
        return cls(name=name, config=config or None, **settings)


def check(spec: Source) -> None:
    """Finds a missing, empty or unsupported local file before any long work; a `datasets` name is not looked up.

    Raises:
        DataError: Naming the file.
    """
    if spec.path is not None:
        data_files(Path(spec.path))


def fingerprint(spec: Source) -> str:
    """SHA-256 of the content and of the settings, 64 hexadecimal digits; the place of the files does not enter."""
    columns = None if spec.columns is None else list(spec.columns)
    split = None if spec.path else spec.split
    settings = [spec.name, spec.config, split, columns, spec.length, spec.samples]
    digest = hashlib.sha256(json.dumps(settings).encode())
    if spec.path is None:
        for row in read_table(spec):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    else:
        for file in data_files(Path(spec.path)):
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def read_table(spec: Source) -> Dataset:
    """All rows of the source, in file order; a `.txt` file is one row with the column `text`.

    Raises:
        DataError: If the source is missing, empty, unreadable, or its files have different columns.
    """
    from datasets import concatenate_datasets, load_dataset

    if spec.path is None:
        try:
            table = load_dataset(str(spec.name), spec.config, split=spec.split)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"cannot load data set {spec.name!r}, split {spec.split!r}: {reason[0]}"
            ) from error
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


def causal_blocks(spec: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokens of all documents one after the other, cut into equal blocks; a rest shorter than a block is dropped.

    Documents are separated by the tokenizer's end token if it has one. Where the tokenizer begins a text with a
    special token, every block begins with it.

    Returns:
        Columns `input_ids` and `labels`, each `(length,)`, int64 tensors; `labels` repeat `input_ids` (transformers
        shifts them).

    Raises:
        DataError: If the source cannot be read, lacks the column, or holds less than one block, or blocks are of one
            token.
    """
    if spec.length < 2:
        raise DataError(
            f"data `length` is {spec.length}; a causal language model predicts each token from those before it, so "
            f"that a sample needs at least 2"
        )
    prefix, _ = _frame(tokenizer)
    blocks = _blocks(spec, tokenizer, prefix, [])
    return _torch_dataset({"input_ids": blocks, "labels": blocks})


def masked_blocks(spec: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """As `causal_blocks`, each block between the special tokens that the tokenizer puts around a text.

    Returns:
        Columns `input_ids` and `special_tokens_mask` (1 at special tokens, which are never hidden), each
        `(length,)`, int64 tensors. Which tokens are hidden is the collator's or the evaluation's choice.

    Raises:
        DataError: As `causal_blocks`.
    """
    prefix, suffix = _frame(tokenizer)
    blocks = _blocks(spec, tokenizer, prefix, suffix)
    special = set(tokenizer.all_special_ids)
    mask = [[int(token in special) for token in block] for block in blocks]
    return _torch_dataset({"input_ids": blocks, "special_tokens_mask": mask})


def sentence_pairs(spec: Source) -> Dataset:
    """Two sentences and how alike they are; STS-Benchmark's headerless files are recognised.

    Returns:
        Columns `sentence1`, `sentence2` (str) and `score` (float, higher = more alike).

    Raises:
        DataError: If a column is missing or a score is not a number.
    """
    from datasets import Dataset

    columns = _columns(spec, PAIR_COLUMNS, "columns of two sentences and a score")
    first, second, score = (column[: spec.samples] for column in columns)
    scores = [_number(value, row, spec) for row, value in enumerate(score)]
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})


def labelled_texts(spec: Source, label2id: Mapping[str, int] | None = None) -> Dataset:
    """Texts with their class.

    Args:
        spec: The source.
        label2id: Class number of each label that is a word, such as `model.config.label2id`; None numbers the words
            in sorted order. Labels that are numbers stay as they are.

    Returns:
        Columns `text` (str) and `label` (int).

    Raises:
        DataError: If a column is missing or a label is not in `label2id`.
    """
    from datasets import Dataset

    columns = _columns(spec, LABEL_COLUMNS, "columns of texts and labels")
    texts, labels = (column[: spec.samples] for column in columns)
    if not all(re.fullmatch(r"-?\d+", str(label)) for label in labels):
        known = label2id or {
            label: number for number, label in enumerate(sorted({str(label) for label in labels}))
        }
        unknown = sorted({str(label) for label in labels} - set(known))
        if unknown:
            raise DataError(
                f"{_label(spec)}: unknown label {unknown[0]!r}; the model knows {', '.join(sorted(known))}"
            )
        labels = [known[str(label)] for label in labels]
    return Dataset.from_dict({"text": texts, "label": [int(label) for label in labels]})


def classification_samples(
    spec: Source, tokenizer: PreTrainedTokenizerBase, label2id: Mapping[str, int] | None = None
) -> Dataset:
    """`labelled_texts`, tokenised and cut after `length` tokens; a padding collator makes batches of them.

    Returns:
        Columns `input_ids`, `attention_mask` (lists of different lengths) and `labels` (int).

    Raises:
        DataError: As `labelled_texts`.
    """
    from datasets import Dataset

    table = labelled_texts(spec, label2id)
    encoded = tokenizer(list(table["text"]), truncation=True, max_length=spec.length)
    columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": list(table["label"])})


def _label(spec: Source) -> str:
    return str(spec.path if spec.path is not None else spec.name)


def _columns(spec: Source, usual: Sequence[tuple[str, ...]], meaning: str) -> list[list[Any]]:
    """Values of the columns that the spec names, or else of the first of the usual ones that are there."""
    table = read_table(spec)
    present = table.column_names
    wanted = _usual(present, usual) if spec.columns is None else tuple(spec.columns)
    if wanted is None:
        fault = f"found no {meaning}"
    elif len(wanted) != len(usual[0]):
        fault = f"`columns` names {len(wanted)}; expected {len(usual[0])}: {meaning}"
    elif missing := [name for name in wanted if name not in present]:
        fault = f"has no column {', '.join(missing)}"
    else:
        return [list(table[name]) for name in wanted]
    raise DataError(f"{_label(spec)}: {fault}; its columns are {', '.join(present)}. Set `columns`")


def _usual(present: Sequence[str], usual: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The first usual set of columns that is present; a lone column is taken for the text."""
    if usual is PAIR_COLUMNS and set(STSB_POSITIONS) <= set(present):
        return STSB_POSITIONS
    if usual is TEXT_COLUMNS and len(present) == 1:
        return (present[0],)
    return next((names for names in usual if set(names) <= set(present)), None)


def _number(value: Any, row: int, spec: Source) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{_label(spec)}, row {row + 1}: score {value!r} is not a number") from error


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return framed[:start], framed[start + len(bare) :]


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Texts in pieces that end at a blank line, each with whether its document ends there."""
    for text in filter(str.strip, texts):
        start = 0
        while len(text) - start > PIECE:
            cut = text.find("\n\n", start + PIECE)
            if cut < 0:
                break
            yield text[start : cut + 2], False
            start = cut + 2
        yield text[start:], True


def _token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    ends_with = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    end = cast(int | None, ends_with)
    pieces = _pieces(documents)
    while batch := list(islice(pieces, 64)):
        # verbose=False: no warning that a text is longer than the model's context, since it is cut into blocks.
        texts = [text for text, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for ids, (_, ends) in zip(cast(list[list[int]], encoded), batch, strict=True):
            yield from ids
            if ends and end is not None:
                yield end


def _blocks(
    spec: Source, tokenizer: PreTrainedTokenizerBase, prefix: list[int], suffix: list[int]
) -> list[list[int]]:
    inner = spec.length - len(prefix) - len(suffix)
    if inner < 1:
        raise DataError(
            f"data `length` {spec.length} leaves no room beside {len(prefix) + len(suffix)} special tokens"
        )
    texts = _columns(spec, TEXT_COLUMNS, "column of texts")[0]
    strange = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if strange is not None:
        kind = type(texts[strange]).__name__
        raise DataError(f"{_label(spec)}, row {strange + 1}: expected text, got {kind}; set `columns`")
    stream = _token_stream(texts, tokenizer)
    blocks = []
    while spec.samples is None or len(blocks) < spec.samples:
        block = list(islice(stream, inner))
        if len(block) < inner:
            break
        blocks.append([*prefix, *block, *suffix])
    if not blocks:
        raise DataError(
            f"{_label(spec)} holds less than one block of {spec.length} tokens; give more text or lower `length`"
        )
    return blocks


def _torch_dataset(columns: dict[str, list[list[int]]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns).with_format("torch")
