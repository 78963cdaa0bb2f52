"""Training samples of each task: the data set, how a batch is made of it, and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

from sparsify.checkpoint.reader import TASKS
from sparsify.data.media import decode_image, decode_sound
from sparsify.data.spec import (
    Source,
    causal_blocks,
    classification_samples,
    image_samples,
    masked_blocks,
    sentence_pairs,
    sentences,
    speech_samples,
    stream_samples,
    target_samples,
)
from sparsify.errors import ConfigError, DataError
from sparsify.training.masked_tokens import TokenHider

Batch = dict[str, Tensor]
# What the speed of a training is told in.
UNITS = frozenset({"tokens", "samples"})
MEDIA_TASKS = ("image-classification", "speech-classification")
# Of pairs that are streamed, whose largest score is not known before: STS-Benchmark's.
STREAMED_TOP_SCORE = 5.0


@dataclass(frozen=True)
class Samples:
    """What the Trainer reads.

    Attributes:
        dataset: Rows in a fixed order.
        collate: Makes a batch of a list of rows.
        loss: Loss of a batch, a scalar; `None` where the model's own output has it.
        unit: What `size` counts: `tokens`, or `samples` where the model takes none.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    unit: str = "tokens"

    def size(self, batch: Batch) -> int:
        """How many units a batch holds, padding included."""
        return batch["input_ids"].numel() if self.unit == "tokens" else len(batch["labels"])


def load_samples(
    spec: Source,
    processor: Any,
    model: nn.Module,
    task: str | None,
    seed: int = 0,
    *,
    labelled: bool = True,
) -> Samples:
    """Reads and prepares training data for a task; with `stream` they are read while they are used.

    Args:
        spec: Where the data are.
        processor: The model's tokenizer, image processor or feature extractor.
        model: The model to train.
        task: A recipe's task, not `auto`; `None` where the model is of no task that can be trained.
        seed: Chooses the hidden tokens of a masked language model.
        labelled: Whether a loss of the task's own is wanted; without one, sentences need no scores.

    Raises:
        ConfigError: If the task has no training data, or the model has nothing that prepares them.
        DataError: If the data cannot be read, or its samples are too long for the model.
    """
    if task is None:
        raise ConfigError(
            f"{type(model).__name__} is of no task that a finetune stage knows ({', '.join(TASKS)}); train it with "
            f"your own loop"
        )
    if task in MEDIA_TASKS:
        if spec.stream:
            raise ConfigError(f"stream is for text; {task} data are read and decoded batch by batch anyway")
        return media_samples(spec, processor, model, task)
    need_tokenizer(processor, task)
    config: Any = (
        set_padding(model, processor) if task in ("sequence-classification", "seq2seq") else model.config
    )
    label2id = config.label2id if task == "sequence-classification" else None
    kind = "sentences" if task == "sentence-embedding" and not labelled else task
    if task in ("causal-lm", "masked-lm"):
        check_length(spec, model)
    if spec.stream:
        collate, loss = _collate(kind, spec, processor, model, seed, None)
        return Samples(Streamed(stream_samples(spec, kind, processor, label2id), collate), collate, loss)
    readers: dict[str, Callable[[], Any]] = {
        "causal-lm": lambda: causal_blocks(spec, processor),
        "masked-lm": lambda: masked_blocks(spec, processor),
        "sequence-classification": lambda: classification_samples(spec, processor, label2id),
        "seq2seq": lambda: target_samples(spec, processor),
        "sentence-embedding": lambda: sentence_pairs(spec),
        "sentences": lambda: sentences(spec),
    }
    dataset: Any = readers[kind]()
    return Samples(dataset, *_collate(kind, spec, processor, model, seed, dataset))


def _collate(
    kind: str, spec: Source, processor: Any, model: nn.Module, seed: int, dataset: Any
) -> tuple[Callable[[list[Any]], Any], Callable[[nn.Module, Batch], Tensor] | None]:
    """What makes batches of rows, and the loss where it is not the model's own."""
    import transformers

    if kind == "causal-lm":
        return transformers.default_data_collator, None
    if kind == "masked-lm":
        if processor.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which masked-lm training needs")
        return TokenHider(processor, seed), None
    if kind == "sequence-classification":
        return transformers.DataCollatorWithPadding(processor), None
    if kind == "seq2seq":
        return target_collator(processor, model), None
    if kind == "sentences":
        return _SentenceCollator(processor, spec.length), None
    # Scores are shares of the largest one, which is known of data that are read whole.
    top = max(1.0, *dataset["score"]) if dataset is not None else STREAMED_TOP_SCORE
    return _PairCollator(processor, spec.length, top), similarity_loss


def in_dtype(batch: Batch, model: nn.Module) -> Batch:
    """The batch with pixels and sound in the dtype of the model's first layer; labels stay as they are."""
    dtype = next(model.parameters()).dtype
    return {
        key: value.to(dtype) if key != "labels" and value.is_floating_point() else value
        for key, value in batch.items()
    }


def target_collator(processor: Any, model: nn.Module) -> Callable[[list[Any]], Any]:
    """Makes batches of texts and their targets, for training and for evaluation."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(processor, model=model)


def media_samples(spec: Source, processor: Any, model: nn.Module, task: str) -> Samples:
    """Pictures or recordings, decoded and prepared when a batch is made.

    Raises:
        ConfigError: If the checkpoint has nothing that prepares them.
        DataError: If the data cannot be read.
    """
    config: Any = model.config
    if task == "image-classification":
        prepare = need_processor(processor, "image_processor", "image processor", task)
        return Samples(image_samples(spec, config.label2id), ImageCollator(prepare), unit="samples")
    prepare = need_processor(processor, "feature_extractor", "feature extractor", task)
    return Samples(speech_samples(spec, config.label2id), SoundCollator(prepare), unit="samples")


def media_example(processor: Any, task: str) -> Batch:
    """Inputs of one black picture, or of one second of silence.

    Raises:
        ConfigError: If the checkpoint has nothing that prepares them.
    """
    if task == "image-classification":
        from PIL import Image

        prepare = need_processor(processor, "image_processor", "image processor", task)
        return dict(prepare([Image.new("RGB", (64, 64))], return_tensors="pt"))
    prepare = need_processor(processor, "feature_extractor", "feature extractor", task)
    return prepare_sounds(prepare, [np.zeros(prepare.sampling_rate, np.float32)])


def prepare_sounds(extractor: Any, sounds: list[np.ndarray]) -> Batch:
    """Inputs of recordings `(samples,)`, which are at the extractor's rate."""
    # Some extractors bring all recordings to one length by themselves; the others have to be told to pad.
    pads = inspect.signature(extractor.__call__).parameters.get("padding")
    options = {"padding": True} if pads is not None and pads.default in (None, False) else {}
    return dict(extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options))


def need_tokenizer(processor: Any, task: str) -> None:
    """Checks that the checkpoint has a tokenizer.

    Raises:
        ConfigError: If not.
    """
    if not callable(getattr(processor, "encode", None)):
        raise ConfigError(
            f"the checkpoint has no tokenizer, which {task} data needs; add tokenizer files to its folder"
        )


def need_processor(processor: Any, part: str, name: str, task: str) -> Any:
    """The image processor or feature extractor, which may be part of a combined processor.

    Raises:
        ConfigError: If the checkpoint has none.
    """
    found = getattr(processor, part, processor)
    if found is None or callable(getattr(found, "encode", None)) or not callable(found):
        raise ConfigError(
            f"the checkpoint has no {name}, which {task} data needs; add its preprocessor_config.json to the folder"
        )
    return found


class Streamed(IterableDataset):
    """Rows that are read while they are used, in the same order each time, again and again without an end.

    To the Trainer that is one long epoch, so that a resumed training finds its place in any pass over the data.

    Args:
        rows: Begins to read.
        collate: What makes batches of them; one that hides tokens hides others in each pass.
    """

    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]], collate: Any) -> None:
        self._rows, self._collate = rows, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for number in count():
            if isinstance(self._collate, TokenHider):
                self._collate.epoch = number
            found = False
            for row in islice(
                self._rows(), worker.id if worker else 0, None, worker.num_workers if worker else 1
            ):
                found = True
                yield row
            if not found:
                raise DataError("the streamed data have no rows left to train on: give more of them")


def check_length(spec: Source, model: nn.Module) -> None:
    """Checks that blocks of text are no longer than what the model has positions for.

    Raises:
        DataError: If they are.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and spec.length > limit:
        raise DataError(
            f"samples of {spec.length} tokens are longer than the {limit} that {type(model).__name__} takes: lower "
            f"the data's `length` (--length)"
        )


def set_padding(model: nn.Module, processor: Any) -> Any:
    """Tells a model which token fills up short texts, as decoders' configs often do not say; returns its config.

    Raises:
        ConfigError: If the tokenizer has no padding token.
    """
    if processor.pad_token_id is None:
        raise ConfigError("the tokenizer has no padding token, which batches of texts need")
    config: Any = model.config
    if config.pad_token_id is None:
        config.pad_token_id = processor.pad_token_id
    return config


@dataclass(frozen=True)
class ImageCollator:
    """Decodes and prepares pictures with an image processor: `pixel_values` `(B, C, H, W)` and `labels` `(B,)`."""

    processor: Any

    def __call__(self, rows: Sequence[Any]) -> Batch:
        images = [decode_image(row["media"]) for row in rows]
        batch = dict(self.processor(images, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


@dataclass(frozen=True)
class SoundCollator:
    """Reads recordings, at the extractor's rate, and prepares them: the model's inputs and `labels` `(B,)`."""

    extractor: Any

    def __call__(self, rows: Sequence[Any]) -> Batch:
        rate = self.extractor.sampling_rate
        batch = prepare_sounds(self.extractor, [decode_sound(row["media"], rate) for row in rows])
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


@dataclass(frozen=True)
class _SentenceCollator:
    """Tokenises sentences without scores."""

    tokenizer: Any
    length: int

    def __call__(self, rows: Sequence[Any]) -> Batch:
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return dict(self.tokenizer([row["text"] for row in rows], **options))


@dataclass(frozen=True)
class _PairCollator:
    """Tokenises sentence pairs; both sentences of all pairs go into one batch, first ones first."""

    tokenizer: Any
    length: int
    top_score: float

    def __call__(self, rows: Sequence[Any]) -> Batch:
        sentences = [row["sentence1"] for row in rows] + [row["sentence2"] for row in rows]
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        batch = dict(self.tokenizer(sentences, **options))
        batch["labels"] = torch.tensor([row["score"] / self.top_score for row in rows])
        return batch


def similarity_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`pair_loss` of a model's embeddings.

    Args:
        model: An encoder whose output has `last_hidden_state` `(2B, T, H)`.
        batch: `labels` `(B,)`; the rest, `(2B, T)`, are the model's inputs.
    """
    return pair_loss(model(**{key: value for key, value in batch.items() if key != "labels"}), batch)


def pair_loss(outputs: Any, batch: Batch) -> Tensor:
    """Mean squared difference between the cosine of two mean-pooled embeddings and their score (at most 1).

    The regression objective of Sentence-BERT (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084).

    Args:
        outputs: An encoder's, with `last_hidden_state` `(2B, T, H)`: the first sentence of each pair, then the second.
        batch: `attention_mask` `(2B, T)` and `labels` `(B,)`.
    """
    hidden = outputs.last_hidden_state.float()
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden)
    first, second = ((hidden * weight).sum(1) / weight.sum(1)).chunk(2)
    return F.mse_loss(F.cosine_similarity(first, second), batch["labels"].to(hidden))
