"""Finding what can be divided in a model: attention by its heads, MLPs by their inner features.

The model's tensor-parallel plan (transformers' `base_model_tp_plan`) says which layers are divided by outputs
(`colwise`) and by inputs (`rowwise`). Those of one attention or one MLP form a group: output `i` of its first layers is
input `i` of its last one, so all of them must be divided alike. What is divided is therefore chosen for a group, by the
stored elements of all its layers together, in *units* that cannot be cut: a key-value head with its queries, one
feature of an MLP; and as many of these together as make whole blocks in every layer of the group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from sparsify.layers.fusion import FusedMlp
from sparsify.layers.mlp_patterns import recognise
from sparsify.parallel.split import SPLITTABLE, Side, costs, features_of, step_of

SIDES: dict[str, Side] = {"colwise": "outputs", "rowwise": "inputs"}
# Dense layers alone could be cut anywhere; kernels like round numbers.
_DENSE_FEATURES = 16


@dataclass(frozen=True)
class Group:
    """Layers that are divided alike.

    Attributes:
        module: Name of the attention or MLP that they belong to.
        layers: Name of each layer -> which side is divided, and its features in one unit.
        units: Number of units.
        granule: Units that stay together, since a block holds features of all of them.
        equal: Whether every rank should get as many units: attention's own work goes by the head.
        inner: Names of parameters between the layers, which every rank has; each sees its own units' gradient alone.
    """

    module: str
    layers: dict[str, tuple[Side, int]]
    units: int
    granule: int
    equal: bool
    inner: tuple[str, ...]

    def costs(self, model: nn.Module) -> list[float]:
        """Stored elements of each granule, over all layers of the group."""
        total = sum(
            costs(model.get_submodule(name), side, unit * self.granule)
            for name, (side, unit) in self.layers.items()
        )
        return total.tolist()  # pyright: ignore[reportAttributeAccessIssue]


def groups(model: nn.Module, plan: Mapping[str, str], ranks: int) -> tuple[list[Group], dict[str, str]]:
    """The groups of a model that can be divided.

    Args:
        model: A model that is whole.
        plan: Module names, `*` for a number -> style, as transformers writes them.
        ranks: Number of parts.

    Returns:
        The groups, and the modules that the plan divides but that stay whole, with the reason.
    """
    found: list[Group] = []
    whole: dict[str, str] = {}
    for name, layers in _planned(model, plan):
        got = _group(model, name, layers, ranks)
        if isinstance(got, Group):
            found.append(got)
        else:
            whole[name] = got
    return found, whole


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """The plan's style for a module."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), plan.get(name))


def _planned(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Side | None]]]:
    """Modules whose children the plan divides; `None` where it does so in a way that is not known here."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        layers: dict[str, Side | None] = {}
        for child, _ in [*module.named_children(), *module.named_parameters(recurse=False)]:
            style = style_of(prefix + child, plan)
            if (
                style is not None
                and not style.startswith("replicate")
                and "gather" not in style
                and style != "colwise_rep"
            ):
                layers[prefix + child] = SIDES.get(style)
        if layers and not all(side is None and "embed" in name for name, side in layers.items()):
            yield name, layers


def _group(model: nn.Module, name: str, layers: Mapping[str, Side | None], ranks: int) -> Group | str:
    """The group of one module, or why it stays whole."""
    module = model.get_submodule(name)
    sides: dict[str, Side] = {}
    for layer, side in layers.items():
        child = module._modules.get(layer.rpartition(".")[2])
        if side is None or type(child) not in SPLITTABLE:
            return f"{layer} cannot be divided"
        sides[layer] = side
    if set(sides.values()) != {"outputs", "inputs"}:
        return "it needs layers that are divided by outputs and one that is divided by inputs"
    sizes = {layer: features_of(model.get_submodule(layer), side) for layer, side in sides.items()}
    outputs = [sizes[layer] for layer, side in sides.items() if side == "outputs"]
    width = getattr(module, "head_dim", None)
    if isinstance(width, int):
        units, what = min(outputs) // width, "key-value heads"
    elif recognise(module.unfused if isinstance(module, FusedMlp) else type(module)) is not None:
        width, units, what = 1, min(outputs), "features"
    else:
        return "it is neither an attention with head_dim nor an MLP that is known"
    if any(size % (units or 1) or not units for size in sizes.values()):
        return f"its layers do not have whole {what}"
    inner = [key for key, _ in module.named_parameters() if f"{name}.{key}".rpartition(".")[0] not in sides]
    if any(module.get_parameter(key).numel() != width for key in inner):
        return f"it has parameters for all {what} together"
    granule = 1 if width > 1 else _dense_granule(model, sides)
    for layer, side in sides.items():
        unit, step = sizes[layer] // units, step_of(model.get_submodule(layer), side)
        granule = math.lcm(granule, step // math.gcd(step, unit))
    count = -(-units // granule)
    if count < ranks:
        return f"{units} {what}, {granule} of which share blocks, cannot be divided among {ranks} ranks"
    return Group(
        name,
        {layer: (side, sizes[layer] // units) for layer, side in sides.items()},
        units,
        granule,
        equal=width > 1,
        inner=tuple(f"{name}.{key}" for key in inner),
    )


def _dense_granule(model: nn.Module, sides: Mapping[str, Side]) -> int:
    dense = all(step_of(model.get_submodule(layer), side) == 1 for layer, side in sides.items())
    return _DENSE_FEATURES if dense else 1
