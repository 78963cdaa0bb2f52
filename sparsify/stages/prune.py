"""Scoring blocks once, choosing masks under the budget, and zeroing what they remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import scopes, sensitivity_file
from sparsify.allocation import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.calibration import needs_calibration
from sparsify.errors import ConfigError
from sparsify.layers.kinds import matrices
from sparsify.permutation import gain, in_words, permute
from sparsify.progress import Progress
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.recipe import PruneStage, Pruning
from sparsify.sequential import prune_in_walks, remove_blocks
from sparsify.stages.state import State
from sparsify.targets import Selection, select


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


def budget(settings: Pruning) -> Budget:
    """The budget that pruning settings describe."""
    curves = None if settings.sensitivity is None else sensitivity_file.read(settings.sensitivity).curves
    return Budget(settings.sparsity, settings.scope, settings.floor, settings.ceiling, curves)


def make_pruner(settings: Pruning) -> Pruner:
    """The pruner that pruning settings name; it also asks for what the scope wants to know.

    Raises:
        PrunerError: If the pruner or an option is unknown.
    """
    pruner: Any = create_pruner(settings.method, **settings.options)
    more = scopes.requires(settings.scope) - pruner.requires
    if more:
        pruner.requires = pruner.requires | more
    return pruner


def prepare(
    model: nn.Module,
    settings: Pruning,
    statistics: Mapping[str, dict[str, Tensor]] | None = None,
    walks: bool = False,
) -> tuple[Pruner, Selection]:
    """Makes the pruner and selects its layers, each with the statistics collected for it.

    Args:
        model: The model.
        settings: What to prune, and how.
        statistics: Statistics by layer name.
        walks: Whether statistics are still to be collected, in walks through the model.

    Raises:
        PrunerError: If the pruner or an option is unknown.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        ConfigError: If the pruner or the scope needs statistics and there are none, or sensitivities of other layers.
    """
    pruner = make_pruner(settings)
    selection = select(model, settings.block, settings.targets, settings.ignore)
    if settings.sensitivity is not None:
        sensitivity_file.curves_for(settings.sensitivity, selection.layers)
    statistics = statistics or {}
    for layer in selection.layers:
        layer.statistics.update(statistics.get(layer.name, {}))
        missing = pruner.requires - layer.statistics.keys()
        if missing and not walks:
            own = min(missing) in type(pruner).requires
            scope = scopes.name_of(settings.scope)
            needs = f"pruner {settings.method!r} needs" if own else f"scope {scope!r} needs"
            raise ConfigError(
                f"{needs} the statistic {min(missing)!r} of layer {layer.name}: put a "
                f"calibrate stage before it (with `sparsify prune` give --data, in Python `calibration`)"
            )
    return pruner, selection


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
        for layer in matrices(name, module, BlockShape(8, 8)):
            if layer.name in masks:
                remove_blocks(layer, masks[layer.name])
