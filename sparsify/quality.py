"""How good a model is: perplexity, hidden-word loss, accuracy, agreement with human similarity scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HIDDEN_SHARE = 0.15
# Called with the number of samples done; drives a progress bar.
Progress = Callable[[int], Any]
# Makes a batch of a list of rows.
Collate = Callable[[list[Any]], Any]


def perplexity(
    model: nn.Module, dataset: Dataset, *, batch: int = 8, progress: Progress | None = None
) -> dict[str, float]:
    """Loss of a causal language model over packed blocks, each token weighing the same.

    Args:
        model: A transformers causal language model.
        dataset: From `sparsify.data.spec.causal_blocks`.
        batch: Blocks in one forward pass.
        progress: Called with the number of blocks done.

    Returns:
        `loss` (nats per predicted token), `perplexity` (its exponential) and `tokens` (predicted ones). The first
        token of a block is not predicted.
    """
    total, count = 0.0, 0
    with _evaluation(model) as device:
        for ids in _batches(dataset["input_ids"], batch, progress):
            ids = ids.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            total += sum(_loss(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True))
            count += ids[:, 1:].numel()
    return _as_perplexity(total, count)


def masked_perplexity(
    model: nn.Module,
    dataset: Dataset,
    mask_token_id: int,
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Loss of a masked language model at hidden tokens: 15 % of each block, the same ones in every call.

    Args:
        model: A transformers masked language model.
        dataset: From `sparsify.data.spec.masked_blocks`.
        mask_token_id: The token that stands in for a hidden one.
        batch: Blocks in one forward pass.
        seed: Chooses the hidden tokens.
        progress: Called with the number of blocks done.

    Returns:
        `loss` (nats per hidden token), `perplexity` and `tokens` (hidden ones).
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    special = torch.as_tensor(dataset["special_tokens_mask"][:]).bool()
    done = 0
    with _evaluation(model) as device:
        for ids in _batches(dataset["input_ids"], batch, progress):
            hidden = torch.rand(ids.shape, generator=generator) < HIDDEN_SHARE
            hidden &= ~special[done : done + len(ids)]
            done += len(ids)
            shown = ids.masked_fill(hidden, mask_token_id)
            logits = model(input_ids=shown.to(device)).logits
            total += _loss(logits[hidden.to(device)], ids[hidden].to(device))
            count += int(hidden.sum())
    return _as_perplexity(total, count)


def accuracy(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Share of texts whose most likely class is the right one.

    Args:
        model: A transformers sequence classifier.
        dataset: From `sparsify.data.spec.classification_samples`.
        tokenizer: Pads the texts of a batch.
        batch: Texts in one forward pass.
        progress: Called with the number of texts done.

    Returns:
        `accuracy` (percent) and `samples`.
    """
    right = 0
    with _evaluation(model) as device:
        for start in range(0, len(dataset), batch):
            rows = dataset[start : start + batch]
            texts = {key: rows[key] for key in ("input_ids", "attention_mask")}
            inputs = tokenizer.pad(texts, return_tensors="pt").to(device)
            predicted = model(**inputs).logits.argmax(-1)
            right += int((predicted.cpu() == torch.as_tensor(rows["labels"])).sum())
            if progress:
                progress(min(start + batch, len(dataset)))
    return {"accuracy": 100.0 * right / len(dataset), "samples": len(dataset)}


def class_accuracy(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Share of pictures or recordings whose most likely class is the right one.

    Args:
        model: A transformers classifier.
        dataset: From `sparsify.data.spec.image_samples` or `speech_samples`.
        collate: Makes a batch of inputs and `labels` of a list of rows.
        batch: Samples in one forward pass.
        progress: Called with the number of samples done.

    Returns:
        `accuracy` (percent) and `samples`.
    """
    right = 0
    with _evaluation(model) as device:
        for inputs, labels in _collated(dataset, collate, batch, device, progress):
            # Pixels and sound come in float32, and must have the dtype of the first layer.
            inputs = {key: value.to(_floating(model, value)) for key, value in inputs.items()}
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return {"accuracy": 100.0 * right / len(dataset), "samples": len(dataset)}


def target_perplexity(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Loss of an encoder and decoder over the tokens of its targets, each weighing the same.

    Args:
        model: A transformers sequence-to-sequence model.
        dataset: From `sparsify.data.spec.target_samples`.
        collate: Makes a batch of inputs and `labels` (-100 is padding) of a list of rows.
        batch: Texts in one forward pass.
        progress: Called with the number of texts done.

    Returns:
        `loss` (nats per token of the targets), `perplexity` and `tokens`.
    """
    total, count = 0.0, 0
    with _evaluation(model) as device:
        for inputs, labels in _collated(dataset, collate, batch, device, progress):
            # The model makes the decoder's inputs of the labels where the batch has none.
            told = {} if "decoder_input_ids" in inputs else {"labels": labels}
            logits = model(**inputs, **told, use_cache=False).logits
            valid = labels != -100
            total += _loss(logits[valid], labels[valid])
            count += int(valid.sum())
    return _as_perplexity(total, count)


def similarity(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 64,
    length: int = 256,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Rank correlation between the cosine of two sentences' embeddings and people's score of their likeness.

    Args:
        model: A transformers encoder.
        dataset: From `sparsify.data.spec.sentence_pairs`.
        tokenizer: The encoder's.
        batch: Sentences in one forward pass.
        length: Tokens after which a sentence is cut.
        progress: Called with the number of sentences done.

    Returns:
        `spearman` (Spearman's rank correlation x 100) and `samples` (pairs).
    """
    sentences = [*dataset["sentence1"], *dataset["sentence2"]]
    embeddings = embed(model, sentences, tokenizer, batch=batch, length=length, progress=progress)
    first, second = embeddings.chunk(2)
    cosine = (first * second).sum(-1)
    scores = torch.tensor(list(dataset["score"]), dtype=torch.float64)
    return {"spearman": 100.0 * spearman(cosine, scores), "samples": len(dataset)}


def embed(
    model: nn.Module,
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 64,
    length: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Unit-length embeddings `(len(sentences), hidden)`, float64 on the CPU: the mean of the last hidden states."""
    # Sentences of like length share a batch: less padding.
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found: list[Tensor] = []
    with _evaluation(model) as device:
        for start in range(0, len(order), batch):
            texts = [sentences[index] for index in order[start : start + batch]]
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(device)
            hidden = model(**inputs).last_hidden_state.double()
            weight = inputs["attention_mask"].unsqueeze(-1).to(hidden)
            found.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).cpu())
            if progress:
                progress(min(start + batch, len(order)))
    embeddings = torch.cat(found)
    return embeddings[torch.tensor(order).argsort()]


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two `(n,)` tensors, -1 to 1; equal values share their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    mean_rank = count.cumsum(0).double() - (count - 1) / 2
    return mean_rank[place]


def _loss(logits: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(logits.float(), targets, reduction="sum"))


def _as_perplexity(total: float, count: int) -> dict[str, float]:
    loss = total / count
    # A ruined model's loss can be beyond what exp can hold.
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": count}


def _collated(
    dataset: Dataset, collate: Collate, batch: int, device: torch.device, progress: Progress | None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and labels of each batch, on the device."""
    for start in range(0, len(dataset), batch):
        rows = range(start, min(start + batch, len(dataset)))
        inputs = {key: value.to(device) for key, value in collate([dataset[row] for row in rows]).items()}
        yield inputs, inputs.pop("labels")
        if progress:
            progress(rows.stop)


def _floating(model: nn.Module, tensor: Tensor) -> torch.dtype:
    return next(model.parameters()).dtype if tensor.is_floating_point() else tensor.dtype


def _batches(column: Any, batch: int, progress: Progress | None) -> Iterator[Tensor]:
    for start in range(0, len(column), batch):
        yield torch.as_tensor(column[start : start + batch])
        if progress:
            progress(min(start + batch, len(column)))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)
