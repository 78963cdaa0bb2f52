"""Learning from a teacher: the dense model that the sparse one came from, or another with the same vocabulary.

The loss of a batch is a weighted sum of the task's own and of up to three distances between student S and teacher T:

    logits     t^2 KL(softmax(T / t) || softmax(S / t))      mean over positions; Hinton et al. 2015, arXiv:1503.02531
    hidden     mean((S_l - T_l)^2) / mean(T_l^2)              mean over layers l; SquareHead, Kurtic et al. 2023,
                                                              arXiv:2310.06927
    embedding  |S / |S| - T / |T||^2                          mean over sentences, of mean-pooled last hidden states

Padding takes no part in any of them. The teacher is in evaluation mode, gets no gradient, and is no part of the
student: neither a checkpoint nor a wrapper for several processes sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import ConfigError
from sparsify.recipe.training import Distill
from sparsify.training.samples import Batch, Samples, pair_loss

EMBEDDING_TASK = "sentence-embedding"
# Key of a batch: which rows of the data set it holds, for outputs of the teacher that were computed before.
ROWS = "teacher_rows"


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, with the defaults of a task filled in; see `sparsify.recipe.training.Distill`."""

    task: float
    logits: float
    temperature: float
    hidden: float
    embedding: float

    @classmethod
    def of(cls, settings: Distill, task: str) -> Weights:
        """The weights that a recipe means for a task.

        Raises:
            ConfigError: If it asks for a term that the task does not have.
        """
        embeds = task == EMBEDDING_TASK
        if embeds and settings.logits:
            raise ConfigError(
                f"distill.logits: {EMBEDDING_TASK} models have no logits; use embedding and hidden"
            )
        if not embeds and settings.embedding:
            raise ConfigError(
                f"distill.embedding is for {EMBEDDING_TASK}; {task} models learn from logits and hidden"
            )
        logits = settings.logits if settings.logits is not None else float(not embeds)
        embedding = settings.embedding if settings.embedding is not None else float(embeds)
        return cls(settings.task, logits, settings.temperature, settings.hidden, embedding)


@dataclass
class Signals:
    """What is compared of a model's outputs, without padding: values of all rows of a batch, one after the other.

    Attributes:
        hidden: States of each layer, `(n, H)`; of an encoder and a decoder one after the other.
        logits: `(n, V)`; of a classifier `(B, classes)`.
        embedding: `(B, H)`.
        counts: How many of a tensor's positions belong to each row of the batch `(B,)`, for each tensor in the order
            hidden, logits, embedding.
    """

    hidden: list[Tensor]
    logits: Tensor | None
    embedding: Tensor | None
    counts: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All values, in the order of `counts`."""
        return [*self.hidden, *(tensor for tensor in (self.logits, self.embedding) if tensor is not None)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Signals:
        """The same signals with other values, in the order of `tensors`."""
        rest = list(tensors)
        hidden = [rest.pop(0) for _ in self.hidden]
        logits = rest.pop(0) if self.logits is not None else None
        return Signals(hidden, logits, rest.pop(0) if rest else None, self.counts)


class Teacher(Protocol):
    """Whoever tells the teacher's signals about a batch, on the batch's device."""

    def __call__(self, batch: Batch, weights: Weights) -> Signals: ...


class Distiller:
    """The loss of a student under a teacher, as `Samples.loss` wants it.

    Args:
        teacher: Tells the teacher's signals.
        weights: Weights of the terms.
        objective: Task loss of a model's outputs and its batch; `None` where the outputs have it.
    """

    def __init__(
        self, teacher: Teacher, weights: Weights, objective: Callable[[Any, Batch], Tensor] | None = None
    ) -> None:
        self._teacher, self._weights, self._objective = teacher, weights, objective

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar in float32.

        Args:
            model: The student, in training mode; perhaps inside a wrapper for several processes.
            batch: Its inputs and labels.

        Raises:
            ConfigError: If student and teacher differ in depth, width or number of logits.
        """
        weights = self._weights
        inputs = {key: value for key, value in batch.items() if key != ROWS}
        own_labels = weights.task == 0 or self._objective is not None
        outputs = forward(model, inputs, weights, labels=not own_labels)
        student, teacher = signals(outputs, inputs, weights, model), self._teacher(batch, weights)
        _compare(student, teacher)
        terms = [(weights.task, lambda: self._task_loss(outputs, inputs))]
        if weights.logits:
            terms.append(
                (weights.logits, lambda: divergence(student.logits, teacher.logits, weights.temperature))
            )
        if weights.hidden:
            terms.append((weights.hidden, lambda: square_head(student.hidden, teacher.hidden)))
        if weights.embedding:
            terms.append(
                (weights.embedding, lambda: embedding_distance(student.embedding, teacher.embedding))
            )
        return torch.stack([weight * term() for weight, term in terms if weight]).sum()

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        return (outputs.loss if self._objective is None else self._objective(outputs, batch)).float()


def distilled(samples: Samples, teacher: Teacher, weights: Weights, task: str) -> Samples:
    """The same samples with a loss that learns from a teacher."""
    return replace(samples, loss=Distiller(teacher, weights, pair_loss if task == EMBEDDING_TASK else None))


def divergence(student: Any, teacher: Any, temperature: float) -> Tensor:
    """Divergence of the student's distribution from the teacher's, times the squared temperature, in nats.

    Args:
        student: Logits `(n, V)`.
        teacher: Logits `(n, V)`.
        temperature: Divides both.
    """
    own = F.log_softmax(student.float() / temperature, dim=-1)
    other = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True) * temperature**2


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared difference, as a share of the teacher's mean square.

    Args:
        student: States of each layer `(n, H)`.
        teacher: The same of the teacher.
    """
    tiny = torch.finfo(torch.float32).tiny
    shares = [
        F.mse_loss(own.float(), other.float()) / other.float().square().mean().clamp_min(tiny)
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(shares).mean()


def embedding_distance(student: Any, teacher: Any) -> Tensor:
    """Mean squared distance, 0 to 4, of embeddings `(B, H)` after scaling each to length 1."""
    own, other = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return (own - other).square().sum(-1).mean()


def forward(model: Any, inputs: Mapping[str, Tensor], weights: Weights, *, labels: bool) -> Any:
    """Outputs of a model with what the terms need; without `labels` no loss is computed where that is possible."""
    # An encoder and decoder makes the decoder's inputs of the labels if the batch has none.
    needed = labels or ("decoder_input_ids" not in inputs and _is_encoder_decoder(model))
    chosen = {key: value for key, value in inputs.items() if needed or key != "labels"}
    return model(**chosen, output_hidden_states=bool(weights.hidden))


def signals(outputs: Any, batch: Batch, weights: Weights, model: Any) -> Signals:
    """What is compared of a model's outputs.

    Args:
        outputs: Of `forward`.
        batch: The inputs, with the masks that tell padding.
        weights: Terms that are 0 are left out.
        model: Whose outputs they are; knows the padding of shortened sequences such as a speech model's frames.
    """
    found, positions = Signals([], None, None, []), _Positions(batch, model)
    if weights.hidden:
        for states, decoder in _stacks(outputs):
            for state in states[1:]:  # the first one is what the first layer gets
                found.hidden.append(positions.pick(state, decoder, found.counts))
    if weights.logits:
        found.logits = positions.pick(outputs.logits, _is_encoder_decoder(model), found.counts)
    if weights.embedding:
        states = outputs.last_hidden_state.float()
        mask = positions.mask(states, decoder=False)
        share = torch.ones_like(states[..., :1]) if mask is None else mask.unsqueeze(-1).to(states)
        found.embedding = positions.pick((states * share).sum(1) / share.sum(1), False, found.counts)
    return found


class _Positions:
    """Picks the positions of a batch that are no padding; where they are is worked out once for all layers."""

    def __init__(self, batch: Batch, model: Any) -> None:
        self._batch, self._model = batch, _inner(model)
        self._known: dict[tuple[bool, int], tuple[Tensor | None, Tensor | None]] = {}

    def pick(self, states: Tensor, decoder: bool, counts: list[Tensor]) -> Tensor:
        """The positions of `states` that count, `(n, ...)`; appends to `counts` how many each row has."""
        if states.dim() != 3:  # one position a sample: a class, an embedding, or a feature map (B, C, H, W)
            counts.append(torch.ones(len(states), dtype=torch.int64))
            return states.flatten(1)
        key = decoder, states.shape[1]
        if key not in self._known:
            mask = self.mask(states, decoder)
            self._known[key] = mask, None if mask is None else mask.flatten().nonzero().squeeze(-1)
        mask, index = self._known[key]
        flat = states.flatten(0, 1)
        if mask is None or index is None:
            counts.append(torch.full((len(states),), states.shape[1], dtype=torch.int64))
            return flat
        counts.append(mask.sum(1))
        return flat.index_select(0, index)

    def mask(self, states: Tensor, decoder: bool) -> Tensor | None:
        """Which positions of `states` `(B, T, ...)` are no padding, `(B, T)` bool; `None` if all count."""
        if decoder:
            labels = self._batch.get("labels")
            mask = self._batch.get("decoder_attention_mask") if labels is None else labels != -100
        else:
            mask = self._batch.get("attention_mask")
        if mask is None:
            return None
        if mask.shape != states.shape[:2]:
            shorten = getattr(self._model, "_get_feature_vector_attention_mask", None)
            mask = None if shorten is None else shorten(states.shape[1], mask)
        return None if mask is None or mask.shape != states.shape[:2] else mask.bool()


def _stacks(outputs: Any) -> list[tuple[Sequence[Tensor], bool]]:
    """Hidden states of each stack of layers, and whether it is a decoder beside an encoder."""
    own = outputs.get("hidden_states")
    if own is not None:
        return [(own, False)]
    both = ((outputs.get("encoder_hidden_states"), False), (outputs.get("decoder_hidden_states"), True))
    found = [(states, decoder) for states, decoder in both if states is not None]
    if not found:
        raise ConfigError("the model does not tell its hidden states: set distill.hidden to 0")
    return found


def _compare(student: Signals, teacher: Signals) -> None:
    """Checks that the two can be compared.

    Raises:
        ConfigError: If not.
    """
    if len(student.hidden) != len(teacher.hidden):
        raise ConfigError(
            f"the teacher has {len(teacher.hidden)} layers and the student {len(student.hidden)}, so their hidden "
            f"states cannot be compared: set distill.hidden to 0, or take a teacher of the same shape"
        )
    pairs = [("hidden states", student.hidden[0], teacher.hidden[0])] if student.hidden else []
    pairs += [
        ("logits", student.logits, teacher.logits),
        ("embeddings", student.embedding, teacher.embedding),
    ]
    for what, own, other in pairs:
        if own is not None and other is not None and own.shape[-1] != other.shape[-1]:
            key = what.split()[0].removesuffix("s") if what != "logits" else what
            raise ConfigError(
                f"the teacher's {what} have {other.shape[-1]} numbers and the student's {own.shape[-1]}: set "
                f"distill.{key} to 0, or take a teacher of the same shape"
            )


def _inner(model: Any) -> Any:
    """The model inside a wrapper for several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(_inner(model).config, "is_encoder_decoder", False))
