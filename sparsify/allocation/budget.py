"""From block scores to block masks under a budget: exact, deterministic, with the weight's own elements counted.

Every scope comes to the same: put blocks in the order in which they would be removed, then cut that order where
the elements removed come nearest to the target. What differs is the order and how many layers share one.

- `layer`: each layer by itself, lowest score first; what one layer misses by rounding, the next one makes up.
- `row`: the same, but the lowest block of every block row goes before the second lowest of any row, so that
  all block rows of a layer keep the same number of blocks, give or take one.
- `global`: all layers in one order; a floor and a ceiling bound the density that any single layer ends with.
- `erdos_renyi`, `outlier`, `sensitivity`, and functions (`sparsify.allocation.scopes`): each layer has a density of
  its own (`sparsify.allocation.shares`), within the same bounds, and loses its lowest scores; of the blocks that these
  densities cut in two, those go that are to lose most.

Where the floor is above zero the best block of a layer is the last to go. Equal scores are removed in the order of
layer, block row, block column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.allocation import scopes, shares
from sparsify.blocks import BlockMask, block_sizes
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import PrunableLayer

SCOPES = scopes.BUILT_IN
# Without a floor of its own a budget lets no layer fall below this share of the mean density; chosen by measurement,
# see docs/decisions/0008-allocation-floor.md.
FLOOR_SHARE = 0.3

Layers = Mapping[str, PrunableLayer] | Sequence[PrunableLayer]


@dataclass(frozen=True)
class Budget:
    """How much of the selected weights goes, and within what each layer must stay.

    Attributes:
        sparsity: Share of the elements to remove, at least 0 and below 1.
        scope: One of `SCOPES`, see the module's docstring; or a function or its name, see `sparsify.allocation.scopes`.
        floor: Lowest density a single layer may end with, 0 to 1; `None` for `FLOOR_SHARE` of the mean density.
        ceiling: Highest density a single layer may end with, 0 to 1.
        curves: For the scope `"sensitivity"`, the loss increase by sparsity of each layer by name.

    Raises:
        ConfigError: If a value is out of range or the values contradict each other.
    """

    sparsity: float
    scope: scopes.Scope = "global"
    floor: float | None = None
    ceiling: float = 1.0
    curves: Mapping[str, shares.Curve] | None = None

    def __post_init__(self) -> None:
        scopes.function_of(self.scope)
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity {self.sparsity} is out of range: it must be at least 0 and below 1")
        for name, value in (("floor", self.floor), ("ceiling", self.ceiling)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} {value} is out of range: it is a layer's density, from 0 to 1")
        if self.scope == "sensitivity" and self.curves is None:
            raise ConfigError(
                "the scope 'sensitivity' needs what was measured: run `sparsify sensitivity MODEL --data FILE` and "
                "give the file that it writes as `sensitivity` (--sensitivity)"
            )
        density = 1.0 - self.sparsity
        if self.floor is not None and self.floor > density + 1e-9:
            raise ConfigError(
                f"floor {self.floor} cannot be kept at sparsity {self.sparsity}: layers would keep {density:g} "
                f"on average; set the floor to {density:g} or lower, or lower the sparsity"
            )
        if self.ceiling < density - 1e-9:
            raise ConfigError(
                f"ceiling {self.ceiling} cannot be kept at sparsity {self.sparsity}: layers would keep {density:g} "
                f"on average; set the ceiling to {density:g} or higher, or raise the sparsity"
            )

    @property
    def least(self) -> float:
        """Lowest density a single layer may end with, 0 to 1, also where `floor` leaves it to us."""
        return FLOOR_SHARE * (1.0 - self.sparsity) if self.floor is None else self.floor

    def masks(self, scores: Mapping[str, Tensor], layers: Layers) -> dict[str, BlockMask]:
        """`allocate` with this budget."""
        return allocate(
            scores, layers, self.sparsity, self.scope, self.floor, self.ceiling, curves=self.curves
        )

    def fit(self, layers: Sequence[PrunableLayer], proportions: Sequence[float]) -> list[float]:
        """Densities in the proportions given, 0 to 1, that meet this budget within its floor and ceiling.

        Args:
            layers: The layers.
            proportions: One number for each, not negative; what a bound takes from a layer goes to the others.

        Raises:
            ConfigError: If that cannot be.
        """
        return shares.proportional(layers, proportions, self.sparsity, self.least, self.ceiling)

    def densities(
        self, layers: Sequence[PrunableLayer], scores: Mapping[str, Tensor] | None = None
    ) -> list[float]:
        """The density that each layer should end with, 0 to 1, for the scopes that give each its own.

        Args:
            layers: The layers.
            scores: Their scores by name, which a function may look at.

        Raises:
            ConfigError: If a layer lacks its sensitivity, or the statistic `input_sq` under the scope `outlier`; or
                if a function's densities cannot be used.
        """
        function = scopes.function_of(self.scope)
        if function is not None:
            return scopes.densities(function, layers, scores or {}, self)
        bounds = (self.sparsity, self.least, self.ceiling)
        if self.scope == "erdos_renyi":
            return shares.erdos_renyi(layers, *bounds)
        if self.scope == "outlier":
            return shares.outlier(layers, *bounds)
        return shares.sensitivity(layers, self.curves or {}, *bounds)


def allocate(
    scores: Mapping[str, Tensor],
    layers: Layers,
    sparsity: float,
    scope: scopes.Scope = "global",
    floor: float | None = None,
    ceiling: float = 1.0,
    *,
    curves: Mapping[str, shares.Curve] | None = None,
) -> dict[str, BlockMask]:
    """Chooses the blocks to keep.

    The elements removed from the whole selection come within half a block of `sparsity` times its elements; under
    every scope but `global` each layer comes within one block of its own share. Floor and ceiling hold to within one
    block of a layer, and exactly wherever the target can be met without splitting a block; `layer` and `row` need none.

    Args:
        scores: For each layer's name `(R, C)` scores, floating point; higher is kept first.
        layers: The layers, in the order in which ties are broken.
        sparsity: Share of the elements to remove, at least 0 and below 1.
        scope: One of `SCOPES`, of which `"outlier"` reads the layers' statistic `input_sq`; or a function.
        floor: Lowest density a single layer may end with, 0 to 1; `None` for `FLOOR_SHARE` of the mean density.
        ceiling: Highest density a single layer may end with, 0 to 1.
        curves: For the scope `"sensitivity"`, the loss increase by sparsity of each layer by name.

    Returns:
        For each layer's name its mask, on the CPU.

    Raises:
        ConfigError: If the budget contradicts itself, or lacks what its scope needs (see `Budget`).
        PrunerError: If a score is missing, has the wrong shape, or is not finite.
    """
    budget = Budget(sparsity, scope, floor, ceiling, curves)
    chosen = list(layers.values()) if isinstance(layers, Mapping) else list(layers)
    if not chosen:
        return {}
    parts = [_Part(layer, checked_score(scores, layer)) for layer in chosen]
    remove = _remove_per_layer if scope in ("layer", "row") else _remove_together
    removed = remove(parts, budget)
    return {
        part.layer.name: BlockMask(~gone.view(part.layer.grid).cpu(), part.layer.shape, part.layer.block)
        for part, gone in zip(parts, removed, strict=True)
    }


class _Part:
    """One layer's scores and own elements, block by block, flattened row by row."""

    def __init__(self, layer: PrunableLayer, scores: Tensor) -> None:
        self.layer = layer
        self.scores = scores.flatten()
        self.sizes = block_sizes(layer.shape, layer.block).flatten().to(scores.device)
        self.elements = layer.shape[0] * layer.shape[1]


def checked_score(scores: Mapping[str, Tensor], layer: PrunableLayer) -> Tensor:
    """The scores `(R, C)` of a layer, if they can be used.

    Raises:
        PrunerError: If they are missing, of the wrong shape or dtype, or not finite.
    """
    score = scores.get(layer.name)
    if score is None:
        raise PrunerError(f"layer {layer.name} has no scores: the pruner must score every selected layer")
    if tuple(score.shape) != layer.grid or not score.is_floating_point():
        raise PrunerError(
            f"scores of layer {layer.name} are {tuple(score.shape)} {score.dtype}: a weight of "
            f"{layer.shape[0]}x{layer.shape[1]} in blocks of {layer.block} needs {layer.grid} of a floating type"
        )
    if not bool(torch.isfinite(score).all()):
        if not all(bool(torch.isfinite(value).all()) for value in layer.statistics.values()):
            raise PrunerError(
                f"calibration inputs of layer {layer.name} hold NaN or infinity: look for damaged weights before it, "
                f"or run the model in a wider dtype"
            )
        raise PrunerError(
            f"scores of layer {layer.name} hold NaN or infinity: its weights or its calibration are damaged"
        )
    return score.detach()


def _remove_per_layer(parts: list[_Part], budget: Budget) -> list[Tensor]:
    removed, owed = [], 0.0
    for part in parts:
        rank = None
        if budget.scope == "row":
            by_score = part.scores.view(part.layer.grid).argsort(dim=1, stable=True)
            rank = by_score.argsort(dim=1, stable=True).flatten()
        target = budget.sparsity * part.elements + owed
        gone = _cut(_order(part.scores, rank), part.sizes, target)
        owed = target - int(part.sizes[gone].sum())
        removed.append(gone)
    return removed


def _remove_together(parts: list[_Part], budget: Budget) -> list[Tensor]:
    device = parts[0].scores.device
    scores = torch.cat([part.scores.to(device) for part in parts])
    sizes = torch.cat([part.sizes.to(device) for part in parts])
    if budget.scope == "global":
        ranks = [_rank(part, budget.least, budget.ceiling) for part in parts]
    else:
        by_name = {part.layer.name: part.scores.view(part.layer.grid) for part in parts}
        densities = budget.densities([part.layer for part in parts], by_name)
        ranks = [_rank(part, density, density) for part, density in zip(parts, densities, strict=True)]
    rank = torch.cat([own.to(device) for own in ranks])
    gone = _cut(_order(scores, rank), sizes, budget.sparsity * sum(part.elements for part in parts))
    return list(gone.split([part.scores.numel() for part in parts]))


def _rank(part: _Part, floor: float, ceiling: float) -> Tensor:
    """When a block may be removed, given what the ceiling forces out of its layer and the floor holds in.

    0: must go; 1 to 2: must go, though the bound falls inside the block, and the earlier the less of the block the
    bound leaves; 2: free; 3: must stay, though the bound falls inside the block; 4: must stay; 5: must stay, as the
    last block of its layer. All but 0 and 4 yield where blocks are too coarse for all bounds to hold at once.
    """
    rounding = 1e-9 * part.elements
    least = (1.0 - ceiling) * part.elements - rounding
    most = (1.0 - floor) * part.elements + rounding
    order = _order(part.scores, None)
    after = part.sizes[order].cumsum(0).double()  # compared with a float, integers would go through float32
    before = after - part.sizes[order]
    rank = torch.full_like(after, 4)
    rank[before < most] = 3
    rank[after <= most] = 2
    forced = before < least
    rank[forced] = (1 + (after - least) / (after - before))[forced]
    rank[after <= least] = 0
    if floor > 0.0:
        rank[-1] = 5
    return torch.empty_like(rank).scatter_(0, order, rank)


def _order(scores: Tensor, rank: Tensor | None) -> Tensor:
    """Indices in order of removal: by rank, then by score, then by position."""
    order = scores.argsort(stable=True)
    return order if rank is None else order[rank[order].argsort(stable=True)]


def _cut(order: Tensor, sizes: Tensor, target: float) -> Tensor:
    """Marks the first blocks of `order` whose elements together come nearest to `target`; bool, like `order`."""
    total = sizes[order].cumsum(0)
    count = int((total <= math.floor(target)).sum())
    missing = target - (int(total[count - 1]) if count else 0)
    if count < len(order) and int(total[count]) - target < missing:
        count += 1
    gone = torch.zeros_like(order, dtype=torch.bool)
    gone[order[:count]] = True
    return gone
