"""Scoring blocks once, choosing masks under the budget, and zeroing what they remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask
from sparsify.calibration.sequential import prune_in_walks, remove_blocks
from sparsify.calibration.statistics import needs_calibration
from sparsify.layers.kinds import every_matrix
from sparsify.permutation import gain, in_words, permute
from sparsify.preparation import budget, prepare
from sparsify.pruner import PrunableLayer, Pruner
from sparsify.recipe.schema import PruneStage, Pruning
from sparsify.runtime.progress import Progress
from sparsify.stages.state import State


def run(stage: PruneStage, state: State) -> None:
    """Prunes the model as it stands, with what an earlier calibration stage read or collected."""
    batches = state.calibration
    pruner, selection = prepare(state.model, stage, state.statistics, walks=batches is not None)
    order_units(stage, state, selection.layers, state.index)
    # Masks alone describe what happened, unless the kept weights change or zeros of earlier masks come back.
    state.changed |= pruner.compensates or stage.reconstruct > 0 or bool(state.masks)
    limits = budget(stage)
    if batches is not None and (stage.reconstruct or needs_calibration(pruner)):
        masks = prune_in_walks(
            state.model,
            pruner,
            selection.layers,
            limits,
            batches,
            reconstruct=stage.reconstruct,
            device=state.device,
            cache=state.cache,
            progress=state.progress,
        )
    else:
        masks = prune_layers(pruner, selection.layers, limits, state.progress)
    state.prune(masks, selection.dense)
    state.trained = False


def order_units(settings: Pruning, state: State, layers: Sequence[PrunableLayer], index: int) -> None:
    """Reorders units before the pruning of stage `index`, if its settings ask for that and it is not done yet.

    Raises:
        ConfigError: If a weight that would be reordered is pruned already.
    """
    if not settings.permute or any(done["stage"] == index for done in state.permuted):
        return
    names = {layer.name for layer in layers}
    permuted = permute(
        state.model,
        settings.block,
        settings.sparsity,
        weights=names,
        masked=state.dense_masks.keys(),
        progress=state.progress,
    )
    gained = gain(permuted)
    state.permuted.append({"stage": index, **gained})
    state.changed |= bool(gained["moved"])
    state.note(in_words(gained, settings.sparsity))


@torch.no_grad()
def prune_layers(
    pruner: Pruner, layers: list[PrunableLayer], budget: Budget, progress: Progress | None = None
) -> dict[str, BlockMask]:
    """Scores all layers, chooses the masks, lets the pruner compensate, and zeroes the removed blocks.

    No weight changes before every score is known to be good.

    Returns:
        The masks by layer name, on the CPU.

    Raises:
        PrunerError: If a weight or a score is not finite, or a score has the wrong shape.
    """
    progress = progress or Progress()
    scores = {}
    with progress.task("scoring blocks", len(layers)) as advance:
        for layer in layers:
            scores[layer.name] = pruner.score(layer)
            advance(text=layer.name)
    masks = budget.masks(scores, layers)
    with progress.task("removing blocks", len(layers)) as advance:
        for layer in layers:
            pruner.update_weights(layer, masks[layer.name])
            remove_blocks(layer, masks[layer.name])
            advance(text=layer.name)
    return masks


@torch.no_grad()
def restore_masks(model: nn.Module, masks: Mapping[str, BlockMask]) -> None:
    """Zeroes what masks of an earlier run removed from the model that they were made for."""
    for name, module in model.named_modules():
        for layer in every_matrix(name, module):
            if layer.name in masks:
                remove_blocks(layer, masks[layer.name])
