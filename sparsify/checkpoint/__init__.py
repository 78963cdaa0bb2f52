"""Checkpoints: the format, its integration with transformers, writing, reading, and the way back to dense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build(config: PreTrainedConfig, model_class: Any = None) -> PreTrainedModel:
    """Builds a block-sparse model from its config alone; see `sparsify.checkpoint.skeleton.build`."""
    # Here, and not by an import above, because that imports transformers.
    from sparsify.checkpoint import skeleton

    return skeleton.build(config, model_class)
