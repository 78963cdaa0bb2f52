"""Data for calibration, training and evaluation: local files or a `datasets` name, tokenised and packed.

One `DataSpec` says where the data are and how they are cut. What comes out is a `datasets.Dataset` in a fixed order:

    causal_blocks           packed blocks of tokens for a causal language model
    masked_blocks           packed blocks framed by the tokenizer's special tokens, for a masked language model
    classification_samples  tokenised texts with a class label
    sentence_pairs          two sentences and a score
    sentences               sentences alone
    target_samples          tokenised texts with the text that a model is to make of them
    image_samples           pictures with a class label (`sparsify.data.media`)
    speech_samples          recordings with a class label (`sparsify.data.media`)

Local text files may be `.txt` (one document a file), `.jsonl`, `.csv`, `.tsv` or `.parquet` (one row an example), alone
or in a folder, which is read in the order of the file names. Tab-separated text is taken as it stands, without quoting.
With `stream`, text is read while it is used: `stream_samples` gives the same rows without holding the source in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sparsify.data.files import SUFFIXES, data_files
from sparsify.data.labelled import (
    class_token_rows,
    label_rows,
    pair_rows,
    sentence_rows,
    target_token_rows,
)
from sparsify.data.labels import number_labels
from sparsify.data.media import (
    IMAGES,
    MEDIA_SUFFIXES,
    SOUNDS,
    image_samples,
    is_media,
    labelled_media,
    media_files,
    speech_samples,
    undecoded,
)
from sparsify.data.tables import LABEL_COLUMNS, TEXT_COLUMNS, Source, read_table, rows_of, text_of, title
from sparsify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataSpec",
    "Source",
    "causal_blocks",
    "check",
    "classes",
    "classification_samples",
    "fingerprint",
    "image_samples",
    "labelled_texts",
    "masked_blocks",
    "read_table",
    "sentence_pairs",
    "sentences",
    "speech_samples",
    "stream_samples",
    "target_samples",
]

# A tokenizer's time and memory grow with the string: long documents go in by pieces of about this many characters.
PIECE = 1 << 16


@dataclass(frozen=True)
class DataSpec:
    """Where data are and how they are cut into samples. Exactly one of `path` and `name` is set.

    Attributes:
        path: File or folder on this machine.
        name: Name of a data set for `datasets.load_dataset`.
        config: Configuration of that data set.
        split: Split of that data set; the library's slices such as `train[:5%]` work. Local files have none.
        columns: Columns to read: one for text, `(text, label)` for classification, `(first, second, score)` for
            pairs. Numbers are positions, from 0, in a `.csv` or `.tsv` file without a header row. None takes the
            usual names (`text`; `text`, `label`; `sentence1`, `sentence2`, `score`; `source`, `target`; `image`,
            `label`; `audio`, `label`).
        length: Tokens per sample.
        samples: Most samples to take, from the front; None takes all.
        stream: Read text while it is used instead of before; for training with a number of steps.

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
    stream: bool = False

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
    if spec.path is None:
        return
    path = Path(spec.path)
    if is_media(path):
        media_files(path)
    elif path.is_dir() and not any(file.suffix in SUFFIXES for file in path.rglob("*")):
        raise DataError(
            f"data folder {path} holds no file of the kinds {', '.join((*SUFFIXES, *MEDIA_SUFFIXES))}"
        )
    else:
        data_files(path)


def classes(spec: Source, task: str) -> dict[str, int]:
    """Class numbers of a classification's labels, for a head that is made for these data.

    Raises:
        DataError: If the source cannot be read, is streamed, or its labels are no classes.
    """
    if spec.stream:
        raise DataError(
            f"{title(spec)} is streamed, and the classes of a new head are known when all labels have been read: leave "
            f"`stream` out, or put label2id into the config.json of a model with a head"
        )
    if task == "sequence-classification":
        rows = rows_of(spec, LABEL_COLUMNS, "columns of texts and labels")
        return number_labels((label for _, label in islice(rows, spec.samples)), spec)
    kind = IMAGES if task == "image-classification" else SOUNDS
    return number_labels(labelled_media(spec, kind)[1], spec)


def fingerprint(spec: Source) -> str:
    """SHA-256 of the content and of the settings, 64 hexadecimal digits; the place of the files does not enter.

    Of a named data set that is streamed, content stands for what its library tells about the version.

    Raises:
        DataError: If the source cannot be read.
    """
    columns = None if spec.columns is None else list(spec.columns)
    split = None if spec.path else spec.split
    settings = [spec.name, spec.config, split, columns, spec.length, spec.samples]
    digest = hashlib.sha256(json.dumps(settings).encode())
    if spec.path is None:
        for row in _told_content(spec):
            digest.update(json.dumps(row, sort_keys=True, default=_as_digest).encode())
        return digest.hexdigest()
    path = Path(spec.path)
    for file in media_files(path) if is_media(path) else data_files(path):
        # In a folder of pictures or sounds the folder's name is the class.
        name = str(file.relative_to(path)) if is_media(path) else file.name
        digest.update(f"\0{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _told_content(spec: Source) -> Iterable[Any]:
    if not spec.stream:
        return undecoded(read_table(spec))
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(str(spec.name), spec.config)
    except Exception as error:
        raise DataError(f"cannot find data set {spec.name!r}: {str(error).splitlines()[0]}") from error
    return [str(builder.hash), str(builder.info.version)]


def _as_digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


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
    blocks = np.stack(list(_blocks(spec, tokenizer, prefix, [])))
    return _torch_dataset({"input_ids": blocks, "labels": blocks})


def masked_blocks(spec: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """As `causal_blocks`, each block between the special tokens that the tokenizer puts around a text.

    Returns:
        Columns `input_ids` and `special_tokens_mask` (1 at special tokens, which are never hidden), each
        `(length,)`, int64 tensors. Which tokens are hidden is the collator's or the evaluation's choice.

    Raises:
        DataError: As `causal_blocks`.
    """
    blocks = np.stack(list(_blocks(spec, tokenizer, *_frame(tokenizer))))
    mask = np.isin(blocks, tokenizer.all_special_ids).astype(np.int64)
    return _torch_dataset({"input_ids": blocks, "special_tokens_mask": mask})


def sentence_pairs(spec: Source) -> Dataset:
    """Two sentences and how alike they are; STS-Benchmark's headerless files are recognised.

    Returns:
        Columns `sentence1`, `sentence2` (str) and `score` (float, higher = more alike).

    Raises:
        DataError: If a column is missing, a sentence empty, or a score not a number.
    """
    return _dataset(pair_rows(spec))


def sentences(spec: Source) -> Dataset:
    """Single sentences: lines of `.txt` files, cells of a column, or both sentences of each pair.

    Returns:
        The column `text` (str), without blank ones.

    Raises:
        DataError: If there are none, or a cell is no text.
    """
    return _dataset(sentence_rows(spec))


def labelled_texts(spec: Source, label2id: Mapping[str, int] | None = None) -> Dataset:
    """Texts with their class.

    Args:
        spec: The source.
        label2id: Class number of each label that is a word, such as `model.config.label2id`; None numbers the words
            in sorted order. Labels that are numbers stay as they are.

    Returns:
        Columns `text` (str) and `label` (int).

    Raises:
        DataError: If a column is missing, a text empty, or a label not in `label2id` or beyond its classes.
    """
    return _dataset(label_rows(spec, label2id))


def classification_samples(
    spec: Source, tokenizer: PreTrainedTokenizerBase, label2id: Mapping[str, int] | None = None
) -> Dataset:
    """`labelled_texts`, tokenised and cut after `length` tokens; a padding collator makes batches of them.

    Returns:
        Columns `input_ids`, `attention_mask` (lists of different lengths) and `labels` (int).

    Raises:
        DataError: As `labelled_texts`.
    """
    return _dataset(class_token_rows(spec, tokenizer, label2id))


def target_samples(spec: Source, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Texts and what a model is to make of them, tokenised and each cut after `length` tokens.

    Returns:
        Columns `input_ids`, `attention_mask` and `labels` (lists of different lengths).

    Raises:
        DataError: If a column is missing or a text empty.
    """
    return _dataset(target_token_rows(spec, tokenizer))


def stream_samples(
    spec: Source, task: str, tokenizer: PreTrainedTokenizerBase, label2id: Mapping[str, int] | None = None
) -> Callable[[], Iterator[dict[str, Any]]]:
    """The rows of a task's data set, read while they are used; each call of the result begins again.

    Args:
        spec: The source, with `stream`.
        task: A recipe's task that reads text; `sentences` for sentences alone.
        tokenizer: The model's.
        label2id: As in `labelled_texts`.

    Raises:
        DataError: As the task's function above, at the row that is at fault.
    """
    if task == "causal-lm":
        prefix, _ = _frame(tokenizer)
        return lambda: (
            {"input_ids": block.tolist(), "labels": block.tolist()}
            for block in _blocks(spec, tokenizer, prefix, [])
        )
    if task == "masked-lm":
        frame, special = _frame(tokenizer), set(tokenizer.all_special_ids)
        return lambda: (
            {"input_ids": block, "special_tokens_mask": [int(token in special) for token in block]}
            for block in (row.tolist() for row in _blocks(spec, tokenizer, *frame))
        )
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "sequence-classification": lambda: class_token_rows(spec, tokenizer, label2id),
        "seq2seq": lambda: target_token_rows(spec, tokenizer),
        "sentence-embedding": lambda: pair_rows(spec),
        "sentences": lambda: sentence_rows(spec),
    }
    return makers[task]


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


def _token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Tokens of the documents, int64, with the end token after each, some documents or parts of one at a time."""
    ends_with = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    end = [] if ends_with is None else [cast(int, ends_with)]
    pieces = _pieces(documents)
    while batch := list(islice(pieces, 64)):
        # verbose=False: no warning that a text is longer than the model's context, since it is cut into blocks.
        texts = [text for text, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        rows = zip(cast(list[list[int]], encoded), batch, strict=True)
        yield np.concatenate(
            [np.array(ids + end if ends else ids, dtype=np.int64) for ids, (_, ends) in rows]
        )


def _blocks(
    spec: Source, tokenizer: PreTrainedTokenizerBase, prefix: list[int], suffix: list[int]
) -> Iterator[np.ndarray]:
    inner = spec.length - len(prefix) - len(suffix)
    if inner < 1:
        raise DataError(
            f"data `length` {spec.length} leaves no room beside {len(prefix) + len(suffix)} special tokens"
        )
    rows = rows_of(spec, TEXT_COLUMNS, "column of texts")
    texts = (text_of(text, row, spec, blank=True) for row, (text,) in enumerate(rows))
    count, rest = 0, np.empty(0, dtype=np.int64)
    for tokens in _token_stream(texts, tokenizer):
        rest = np.concatenate([rest, tokens])
        whole = len(rest) // inner
        for own in rest[: whole * inner].reshape(whole, inner):
            yield np.concatenate([prefix, own, suffix]).astype(np.int64)
            count += 1
            if count == spec.samples:
                return
        rest = rest[whole * inner :]
    if not count:
        raise DataError(
            f"{title(spec)} holds less than one block of {spec.length} tokens; give more text or lower `length`"
        )


def _dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def _torch_dataset(columns: dict[str, np.ndarray]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns).with_format("torch")
