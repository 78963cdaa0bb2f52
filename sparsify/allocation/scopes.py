"""Scopes of one's own: a function that says how dense each layer shall be.

    def deeper_is_denser(layers, scores, budget):
        return budget.fit(layers, [1 + i / len(layers) for i in range(len(layers))])

It is called with the layers, their scores `(R, C)` by layer name, and the `Budget`, whenever masks
are made; during training that is every step, with the sparsity of that step in `budget.sparsity`. It returns one
density for each layer, 0 to 1, in the order of the layers or by their names. They are taken as they are: their mean,
weighted by the layers' sizes, is what the budget keeps, and each is within its floor and ceiling, or there is an error.
`budget.fit` brings any proportions to that. If it reads the layers' statistic `input_sq`, its attribute `requires` says
so, `{"input_sq"}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from sparsify import custom
from sparsify.errors import ConfigError, SparsifyError
from sparsify.pruner import PrunableLayer

if TYPE_CHECKING:
    from sparsify.allocation.budget import Budget

BUILT_IN = ("global", "layer", "row", "erdos_renyi", "outlier", "sensitivity")
# How far the mean of returned densities may be from what the budget keeps; people round.
TOLERANCE = 1e-3

Function: TypeAlias = Callable[
    [Sequence[PrunableLayer], Mapping[str, Tensor], "Budget"], Sequence[float] | Mapping[str, float]
]
Scope: TypeAlias = str | Function


def function_of(scope: Scope) -> Function | None:
    """The function that a scope is or names as `package.module:function`; `None` for a built-in one.

    Raises:
        ConfigError: If there is no such scope.
    """
    if isinstance(scope, str) and scope in BUILT_IN:
        return None
    if isinstance(scope, str) and ":" not in scope:
        raise ConfigError(
            f"scope {scope!r} is unknown: choose one of {', '.join(BUILT_IN)}, or package.module:function"
        )
    found: Any = custom.find(scope, "scope", ConfigError) if isinstance(scope, str) else scope
    if not callable(found):
        raise ConfigError(
            f"{name_of(scope)!r} is not a scope: it must be a function of (layers, scores, budget)"
        )
    return found  # pyright: ignore[reportReturnType]


def name_of(scope: Scope) -> str:
    """A scope's name, for people."""
    if isinstance(scope, str):
        return scope
    return f"{getattr(scope, '__module__', '')}:{getattr(scope, '__qualname__', repr(scope))}"


def requires(scope: Scope) -> frozenset[str]:
    """The calibration statistics that a scope reads.

    Raises:
        ConfigError: If it asks for one that nobody collects.
    """
    if scope == "outlier":
        return frozenset({"input_sq"})
    wanted = getattr(function_of(scope), "requires", frozenset())
    if not isinstance(wanted, (set, frozenset)) or not wanted <= {"input_sq"}:
        raise ConfigError(
            f"scope {name_of(scope)!r} has requires = {wanted!r}: a scope can ask for {{'input_sq'}} alone"
        )
    return frozenset(wanted)


def densities(
    function: Function, layers: Sequence[PrunableLayer], scores: Mapping[str, Tensor], budget: Budget
) -> list[float]:
    """The density of each layer, 0 to 1, that a scope of one's own gives it.

    Raises:
        ConfigError: If the function fails, or what it returns is not one density a layer, breaks floor or ceiling,
            or does not meet the budget.
    """
    name = name_of(budget.scope)
    try:
        returned = function(layers, scores, budget)
    except SparsifyError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigError(f"scope {name!r} failed: {custom.described(error)}") from error
    given = [_number(value) for value in _in_order(returned, layers, name)]
    for layer, density in zip(layers, given, strict=True):
        if not budget.least - 1e-9 <= density <= budget.ceiling + 1e-9:
            raise ConfigError(
                f"scope {name!r} gives layer {layer.name} the density {density:g}: it must be from {budget.least:g} to "
                f"{budget.ceiling:g} (floor and ceiling); budget.fit(layers, densities) sees to that"
            )
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    mean = sum(density * size for density, size in zip(given, sizes, strict=True)) / sum(sizes)
    if abs(mean - (1.0 - budget.sparsity)) > TOLERANCE:
        raise ConfigError(
            f"scope {name!r} keeps {mean:.4g} of the weights, the budget {1.0 - budget.sparsity:.4g}: return "
            f"budget.fit(layers, densities), which keeps their proportions"
        )
    return given


def _in_order(returned: Any, layers: Sequence[PrunableLayer], name: str) -> list[Any]:
    if isinstance(returned, Mapping):
        missing = [layer.name for layer in layers if layer.name not in returned]
        if missing:
            raise ConfigError(f"scope {name!r} gives no density to layer {missing[0]}")
        return [returned[layer.name] for layer in layers]
    if isinstance(returned, Tensor):
        returned = returned.flatten().tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise ConfigError(
            f"scope {name!r} returned {type(returned).__name__}: it must return one density for each layer"
        )
    if len(returned) != len(layers):
        raise ConfigError(
            f"scope {name!r} returned {len(returned)} densities for {len(layers)} layers: it must return one for each"
        )
    return list(returned)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
