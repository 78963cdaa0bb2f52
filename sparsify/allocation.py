"""From block scores to block masks under a budget: exact, deterministic, with the weight's own elements counted.

Every scope comes to the same: put blocks in the order in which they would be removed, then cut that order where
the elements removed come nearest to the target. What differs is the order and how many layers share one.

- `layer`: each layer by itself, lowest score first; what one layer misses by rounding, the next one makes up.
- `row`: the same, but the lowest block of every block row goes before the second lowest of any row, so that
  all block rows of a layer keep the same number of blocks, give or take one.
- `global`: all layers in one order; a floor and a ceiling bound the density that any single layer ends with.

Equal scores are removed in the order of layer, block row, block column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, block_sizes
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import PrunableLayer

SCOPES = ("layer", "row", "global")

Layers = Mapping[str, PrunableLayer] | Sequence[PrunableLayer]


@dataclass(frozen=True)
class Budget:
    """How much of the selected weights goes, and within what each layer must stay.

    Attributes:
        sparsity: Share of the elements to remove, at least 0 and below 1.
        scope: `"layer"`, `"row"` or `"global"`; see the module's docstring.
        floor: Lowest density a single layer may end with, 0 to 1.
        ceiling: Highest density a single layer may end with, 0 to 1.

    Raises:
        ConfigError: If a value is out of range or the values contradict each other.
    """

    sparsity: float
    scope: str = "global"
    floor: float = 0.0
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"scope {self.scope!r} is unknown: choose one of {', '.join(SCOPES)}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity {self.sparsity} is out of range: it must be at least 0 and below 1")
        for name, value in (("floor", self.floor), ("ceiling", self.ceiling)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} {value} is out of range: it is a layer's density, from 0 to 1")
        density = 1.0 - self.sparsity
        if self.floor > density + 1e-9:
            raise ConfigError(
                f"floor {self.floor} cannot be kept at sparsity {self.sparsity}: layers would keep {density:g} "
                f"on average; set the floor to {density:g} or lower, or lower the sparsity"
            )
        if self.ceiling < density - 1e-9:
            raise ConfigError(
                f"ceiling {self.ceiling} cannot be kept at sparsity {self.sparsity}: layers would keep {density:g} "
                f"on average; set the ceiling to {density:g} or higher, or raise the sparsity"
            )

    def masks(self, scores: Mapping[str, Tensor], layers: Layers) -> dict[str, BlockMask]:
        """`allocate` with this budget."""
        return allocate(scores, layers, self.sparsity, self.scope, self.floor, self.ceiling)


def allocate(
    scores: Mapping[str, Tensor],
    layers: Layers,
    sparsity: float,
    scope: str = "global",
    floor: float = 0.0,
    ceiling: float = 1.0,
) -> dict[str, BlockMask]:
    """Chooses the blocks to keep.

    The elements removed from the whole selection come within half a block of `sparsity` times its elements; under
    `layer` and `row` scope each layer comes within one block of its own share. Floor and ceiling hold to within
    one block of a layer, and exactly wherever the target can be met without splitting a block.

    Args:
        scores: For each layer's name `(R, C)` scores, floating point; higher is kept first.
        layers: The layers, in the order in which ties are broken.
        sparsity: Share of the elements to remove, at least 0 and below 1.
        scope: `"layer"`, `"row"` or `"global"`.
        floor: Lowest density a single layer may end with, 0 to 1.
        ceiling: Highest density a single layer may end with, 0 to 1.

    Returns:
        For each layer's name its mask, on the CPU.

    Raises:
        ConfigError: If the budget contradicts itself (see `Budget`).
        PrunerError: If a score is missing, has the wrong shape, or is not finite.
    """
    budget = Budget(sparsity, scope, floor, ceiling)
    chosen = list(layers.values()) if isinstance(layers, Mapping) else list(layers)
    if not chosen:
        return {}
    parts = [_Part(layer, _checked(scores, layer)) for layer in chosen]
    removed = _remove_globally(parts, budget) if scope == "global" else _remove_per_layer(parts, budget)
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


def _checked(scores: Mapping[str, Tensor], layer: PrunableLayer) -> Tensor:
    score = scores.get(layer.name)
    if score is None:
        raise PrunerError(f"layer {layer.name} has no scores: the pruner must score every selected layer")
    if tuple(score.shape) != layer.grid or not score.is_floating_point():
        raise PrunerError(
            f"scores of layer {layer.name} are {tuple(score.shape)} {score.dtype}: a weight of "
            f"{layer.shape[0]}x{layer.shape[1]} in blocks of {layer.block} needs {layer.grid} of a floating type"
        )
    if not bool(torch.isfinite(score).all()):
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


def _remove_globally(parts: list[_Part], budget: Budget) -> list[Tensor]:
    device = parts[0].scores.device
    scores = torch.cat([part.scores.to(device) for part in parts])
    sizes = torch.cat([part.sizes.to(device) for part in parts])
    rank = None
    if budget.floor > 0.0 or budget.ceiling < 1.0:
        rank = torch.cat([_bounds_rank(part, budget).to(device) for part in parts])
    gone = _cut(_order(scores, rank), sizes, budget.sparsity * sum(part.elements for part in parts))
    return list(gone.split([part.scores.numel() for part in parts]))


def _bounds_rank(part: _Part, budget: Budget) -> Tensor:
    """When a block may be removed, given what the ceiling forces out of its layer and the floor holds in.

    0: must go; 1: must go, though the bound falls inside the block; 2: free; 3: must stay, though the bound falls
    inside the block; 4: must stay. Ranks 1 and 3 yield where blocks are too coarse for all bounds to hold at once.
    """
    rounding = 1e-9 * part.elements
    least = (1.0 - budget.ceiling) * part.elements - rounding
    most = (1.0 - budget.floor) * part.elements + rounding
    order = _order(part.scores, None)
    after = part.sizes[order].cumsum(0).double()  # compared with a float, integers would go through float32
    before = after - part.sizes[order]
    rank = torch.full_like(order, 4)
    rank[before < most] = 3
    rank[after <= most] = 2
    rank[before < least] = 1
    rank[after <= least] = 0
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
