"""From the settings of a recipe to what they name: the pruner, its layers, the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsify import sensitivity_file
from sparsify.allocation import scopes
from sparsify.allocation.budget import Budget
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import Pruner, create_pruner, name_of
from sparsify.recipe.schema import Pruning
from sparsify.targets import Selection, select


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


def selected(model: nn.Module, settings: Pruning) -> Selection:
    """The layers that pruning settings mean, and what stays dense.

    Raises:
        TargetError: If a pattern matches nothing, or nothing can be pruned.
    """
    return select(model, settings.block, settings.targets, settings.ignore, settings.per_position)


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
        PrunerError: If the pruner or an option is unknown, or a weight is not in memory.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        ConfigError: If the pruner or the scope needs statistics and there are none, or sensitivities of other layers.
    """
    pruner = make_pruner(settings)
    selection = selected(model, settings)
    if settings.sensitivity is not None:
        sensitivity_file.curves_for(settings.sensitivity, selection.layers)
    statistics = statistics or {}
    for layer in selection.layers:
        if layer.parameter.device.type == "meta":
            raise PrunerError(
                f"the weight of {layer.name} is on the meta device, not loaded yet or offloaded: load the model into "
                f"memory first"
            )
        layer.statistics.update(statistics.get(layer.name, {}))
        missing = pruner.requires - layer.statistics.keys()
        if missing and not walks:
            own = min(missing) in type(pruner).requires
            scope = scopes.name_of(settings.scope)
            needs = f"pruner {name_of(settings.method)!r} needs" if own else f"scope {scope!r} needs"
            raise ConfigError(
                f"{needs} the statistic {min(missing)!r} of layer {layer.name}: put a "
                f"calibrate stage before it (with `sparsify prune` give --data, in Python `calibration`)"
            )
    return pruner, selection
