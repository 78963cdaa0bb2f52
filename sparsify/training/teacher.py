"""The teacher of a distillation: loaded, compared with the student, and kept where there is memory for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint import reader
from sparsify.errors import ConfigError
from sparsify.recipe.training import Distill
from sparsify.training.distillation import EMBEDDING_TASK, Signals, Weights, forward, signals
from sparsify.training.samples import Batch, set_padding


def load_teacher(
    settings: Distill,
    source: str,
    task: str,
    processor: Any,
    device: torch.device,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a teacher in evaluation mode; none of its parameters has a gradient.

    Args:
        settings: The recipe's `distill` section.
        source: The recipe's own dense model, which teaches where the section names no other.
        task: A recipe's task, not `auto`.
        processor: The student's tokenizer, image processor or feature extractor.
        device: Where the student is trained.
        trust_remote_code: Run the Python code that comes with the checkpoint.

    Raises:
        CheckpointError: If it cannot be loaded.
        ConfigError: If it has another vocabulary, or no trained head for the task.
    """
    path = settings.teacher or source
    _check_vocabulary(path, processor, trust_remote_code)
    dtype: str | None = settings.teacher_dtype
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 and settings.teacher_memory != "cpu" else None
    home = device if settings.teacher_memory in ("device", "cache") else torch.device("cpu")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model: Any = reader.load(path, home, dtype, task, trust_remote_code, complete=True)
    lacks = next(
        (str(one.message) for one in told if "random until they are trained" in str(one.message)), None
    )
    if lacks is not None and task != EMBEDDING_TASK:
        raise ConfigError(
            f"the teacher is not trained for {task}: {lacks.split(':')[0]}; name a trained one with distill.teacher"
        )
    reader.check_weights(model)
    if task == "sequence-classification":
        set_padding(model, processor)
    return model.eval().requires_grad_(False)


def _check_vocabulary(path: str, processor: Any, trust_remote_code: bool) -> None:
    """Checks that a teacher reads the tokens that the student's tokenizer writes.

    Raises:
        ConfigError: If not.
    """
    if not callable(getattr(processor, "get_vocab", None)):
        return
    other = reader.load_processor(path, trust_remote_code)
    if not callable(getattr(other, "get_vocab", None)):
        raise ConfigError(f"the teacher {path} has no tokenizer, so its vocabulary cannot be compared")
    own, its = processor.get_vocab(), other.get_vocab()
    if own != its:
        raise ConfigError(
            f"the teacher {path} has another vocabulary ({len(its)} tokens, the student's has {len(own)}): take a "
            f"teacher with the student's tokenizer"
        )


class LiveTeacher:
    """A teacher that runs on each batch.

    Args:
        model: From `load_teacher`.
        offload: Bring the model to the batch's device for each batch, and back to the CPU.
    """

    def __init__(self, model: nn.Module, *, offload: bool = False) -> None:
        self._model, self._offload = model, offload

    @torch.no_grad()
    def __call__(self, batch: Batch, weights: Weights) -> Signals:
        """The teacher's signals, on the batch's device."""
        device = next(iter(batch.values())).device
        if self._offload:
            self._model.to(device)
        found = teacher_signals(self._model, batch, weights)
        if self._offload:
            self._model.to("cpu")
        return found.with_tensors([tensor.to(device) for tensor in found.tensors])


def teacher_signals(model: nn.Module, batch: Batch, weights: Weights) -> Signals:
    """Runs a teacher on a batch, wherever the batch is; the signals are on the teacher's device."""
    parameter = next(model.parameters())

    def moved(tensor: Tensor) -> Tensor:
        # Pixels and sound come in float32, and must have the dtype of the first layer.
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)

    inputs = {
        key: moved(value) if key != "labels" else value.to(parameter.device) for key, value in batch.items()
    }
    # Mixed precision is the student's; the teacher computes in its own dtype.
    with torch.autocast(parameter.device.type, enabled=False):
        return signals(forward(model, inputs, weights, labels=False), inputs, weights, model)
