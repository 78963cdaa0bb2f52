"""The weights' final form: packed blocks, or dense with zeros."""

from __future__ import annotations

from sparsify.checkpoint.quantizer import attach
from sparsify.layers import swap
from sparsify.recipe import ConvertStage
from sparsify.stages.state import State


def run(stage: ConvertStage, state: State) -> None:
    """Packs the model's layers, unless dense weights are asked for or a stage before packed them already."""
    if stage.format == "block_sparse":
        pack(state)


def pack(state: State) -> None:
    """Swaps masked layers for block-sparse ones that hold the kept blocks alone."""
    masks = state.dense_masks
    if not masks:
        return
    with state.progress.task("packing blocks"):
        swap.convert(state.model, masks)
        attach(state.model)
