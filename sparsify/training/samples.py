"""Training samples of each task: the data set, how a batch is made of it, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.data import Source, causal_blocks, classification_samples, masked_blocks, sentence_pairs
from sparsify.errors import ConfigError, DataError

Batch = dict[str, Tensor]
# What the speed of a training is told in.
UNITS = frozenset({"tokens", "samples"})


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


def load_samples(spec: Source, processor: Any, model: nn.Module, task: str | None, seed: int = 0) -> Samples:
    """Reads and tokenises training data for a task.

    Args:
        spec: Where the text is.
        processor: The model's tokenizer.
        model: The model to train.
        task: A recipe's task, not `auto`; `None` where the model is of no task that can be trained.
        seed: Chooses the hidden tokens of a masked language model.

    Raises:
        ConfigError: If the task has no training data, or the model no tokenizer.
        DataError: If the data cannot be read, or its samples are too long for the model.
    """
    if task is None:
        raise ConfigError(
            f"{type(model).__name__} is of no task that a finetune stage knows (causal-lm, masked-lm, "
            f"sequence-classification, sentence-embedding); train it with your own loop"
        )
    if not callable(getattr(processor, "encode", None)):
        raise ConfigError(
            f"the checkpoint has no tokenizer, which {task} data needs; add tokenizer files to its folder"
        )
    if task == "causal-lm":
        from transformers import default_data_collator

        blocks = causal_blocks(spec, processor)
        check_length(spec, model)
        return Samples(blocks, default_data_collator)
    if task == "masked-lm":
        from transformers import DataCollatorForLanguageModeling

        if processor.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which masked-lm training needs")
        blocks = masked_blocks(spec, processor)
        check_length(spec, model)
        return Samples(blocks, DataCollatorForLanguageModeling(processor, seed=seed))
    if task == "sequence-classification":
        from transformers import DataCollatorWithPadding

        config: Any = set_padding(model, processor)
        dataset = classification_samples(spec, processor, config.label2id)
        return Samples(dataset, DataCollatorWithPadding(processor))
    pairs = sentence_pairs(spec)
    return Samples(pairs, _PairCollator(processor, spec.length, max(1.0, *pairs["score"])), similarity_loss)


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
    """Tells a classifier which token fills up short texts, as decoders' configs often do not say; returns its config.

    Raises:
        ConfigError: If the tokenizer has no padding token.
    """
    if processor.pad_token_id is None:
        raise ConfigError("the tokenizer has no padding token, which sequence-classification needs")
    config: Any = model.config
    if config.pad_token_id is None:
        config.pad_token_id = processor.pad_token_id
    return config


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
    """Mean squared difference between the cosine of two mean-pooled embeddings and their score (at most 1).

    The regression objective of Sentence-BERT (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084).

    Args:
        model: An encoder whose output has `last_hidden_state` `(2B, T, H)`.
        batch: `labels` `(B,)`; the rest, `(2B, T)`, are the model's inputs.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**inputs).last_hidden_state.float()
    weight = inputs["attention_mask"].unsqueeze(-1).to(hidden)
    first, second = ((hidden * weight).sum(1) / weight.sum(1)).chunk(2)
    return F.mse_loss(F.cosine_similarity(first, second), batch["labels"].to(hidden))
