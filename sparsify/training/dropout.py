"""The share of activations that dropout hides, for the length of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Last words of the attributes in which modules of transformers and torch keep a probability of dropout.
_NAMES = ("dropout", "dropout_prob", "dropout_rate", "dropout_p")


@contextmanager
def dropout_of(model: nn.Module, share: float | None) -> Iterator[None]:
    """Sets every probability of dropout in `model`; afterwards each has its own value back.

    Attention's own, which fused attention takes as a number, is one of them; that of adapters (LoRA) and stochastic
    depth are not.

    Args:
        model: Any model.
        share: Probability, 0 to 1; `None` leaves all as they are.
    """
    found: list[tuple[Any, str, float]] = []
    if share is not None:
        for name, module in model.named_modules():
            if "lora_" not in name:
                found += [(module, key, getattr(module, key)) for key in _probabilities(module)]
    try:
        for module, key, _ in found:
            setattr(module, key, share)
        yield
    finally:
        for module, key, own in found:
            setattr(module, key, own)


def _probabilities(module: nn.Module) -> list[str]:
    """Attributes of a module that are probabilities of dropout."""
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [key for key, value in vars(module).items() if key.endswith(_NAMES) and isinstance(value, float)]
