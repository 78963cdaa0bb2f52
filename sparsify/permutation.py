"""Putting a network's units in an order that concentrates importance into blocks, without changing its function.

A block keeps all of its weights or none, so it pays if strong weights share blocks. Units of a free symmetry
(`sparsify.symmetries`) can be put in any order. The order is found as in k-means with clusters of fixed size: given
the blocks that the budget would keep, every unit goes where most of its squared weight is kept, as far as there is
room, the units that have most to lose first; given the order, the budget chooses its blocks anew. The first order is
that of the units' total importance. What is maximised is the squared weight that the budget keeps: the objective of
channel permutation for 2:4 sparsity (Pool and Yu 2021), for blocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError
from sparsify.masking import current_masks
from sparsify.runtime.progress import Progress
from sparsify.symmetries import Axis, Symmetry, symmetries

# Rounds at the most; the first ones gain nearly everything.
ROUNDS = 8


@dataclass(frozen=True)
class Permuted:
    """What an order of units gained.

    Attributes:
        name: The symmetry's name.
        units: Its units.
        before: Share of the squared weight in the blocks that the budget kept, 0 to 1.
        after: The same in the new order.
    """

    name: str
    units: int
    before: float
    after: float


def permute(
    model: nn.Module,
    block: BlockShape | str | int | tuple[int, int],
    sparsity: float,
    *,
    layers: Mapping[str, Tensor] | None = None,
    weights: Collection[str] | None = None,
    masked: Collection[str] = (),
    progress: Progress | None = None,
) -> list[Permuted]:
    """Reorders the units of free symmetries of a dense model, in place; its function does not change.

    Args:
        model: A dense model.
        block: Block shape `(out, in)` that the model will be pruned in.
        sparsity: Share of the weights that will be removed, 0 to 1.
        layers: Mean square of each input feature `(K,)` by layer name, where importance should count how strongly a
            weight is used (Wanda, Sun et al. 2023); squared weights alone by default.
        weights: Names of the weights that will be pruned, all by default. Only they count, and a symmetry that shows
            in none of them is left alone.
        masked: Names of weights with a mask that is not in their forward pass. Those whose mask is are known.
        progress: Shows how far it is.

    Returns:
        What was gained, for each symmetry.

    Raises:
        ConfigError: If a weight that would be reordered has a mask in force; nothing has changed then.
    """
    shape, progress = BlockShape.parse(block), progress or Progress()
    weights = None if weights is None else {_whole(name) for name in weights}
    found = [own for own in symmetries(model) if weights is None or _matrices(own, weights)]
    fixed = {_whole(name) for name in (*masked, *current_masks(model))}
    for symmetry in found:
        for axis in symmetry.axes:
            if axis.name in fixed:
                raise ConfigError(
                    f"cannot reorder the units of {symmetry.name}: {axis.name} is pruned already, and its mask would "
                    f"no longer fit; order units when it is pruned for the first time"
                )
    gained = []
    with progress.task("ordering units", len(found)) as advance:
        for symmetry in found:
            order, before, after = best_order(symmetry, shape, sparsity, layers, weights)
            if after > before:
                symmetry.apply(order)
            gained.append(Permuted(symmetry.name, symmetry.units, before, max(before, after)))
            advance(text=symmetry.name)
    return gained


def gain(permuted: Sequence[Permuted]) -> dict[str, float]:
    """What an order gained over all symmetries, for a report.

    Returns:
        `symmetries` (how many), `moved` (in how many of them the order changed), `before` and `after` (mean over them
        of the share of the squared weight in the blocks that the budget keeps, 0 to 1).
    """
    count = max(1, len(permuted))
    return {
        "symmetries": len(permuted),
        "moved": sum(own.after > own.before for own in permuted),
        "before": sum(own.before for own in permuted) / count,
        "after": sum(own.after for own in permuted) / count,
    }


def in_words(gained: Mapping[str, float], sparsity: float) -> str:
    """`gain` as one line."""
    if not gained["symmetries"]:
        return (
            "permute: no units are known that could change places in what is pruned; the order stays as it is"
        )
    return (
        f"permute: reordered {gained['moved']} of {gained['symmetries']} groups of units; at {sparsity:.0%} the blocks "
        f"kept hold {gained['after']:.1%} of their squared weight, {gained['before']:.1%} before"
    )


class _View:
    """One weight as a symmetry sees it: the importance of each unit in each block across.

    Attributes:
        importance: `(units, C)` summed over the features of each block in the other direction.
        group: `(units,)` block along the units' direction of each place.
        groups: How many.
    """

    def __init__(self, axis: Axis, block: BlockShape, used: Tensor | None) -> None:
        squared = axis.tensor.float().square()
        if used is not None:
            squared = squared * used.to(squared).view(squared.shape[1:])
        if squared.dim() == 3:  # kernel positions, which share a mask
            squared = squared.sum(2)
        if axis.dim == 1:
            squared = squared.t()
        along, across = (block.rows, block.cols) if axis.dim == 0 else (block.cols, block.rows)
        own = squared.index_select(0, axis.positions.to(squared.device))
        pad = -own.shape[1] % across
        self.importance = torch.nn.functional.pad(own, (0, pad)).unflatten(1, (-1, across)).sum(2)
        place = (axis.positions // along).to(squared.device)
        _, self.group = place.unique(return_inverse=True)
        self.groups = int(self.group.max()) + 1

    def blocks(self, order: Tensor) -> Tensor:
        """`(groups, C)` importance of each block in an order."""
        sums = self.importance.new_zeros(self.groups, self.importance.shape[1])
        return sums.index_add_(0, self.group, self.importance[order])


def best_order(
    symmetry: Symmetry,
    block: BlockShape,
    sparsity: float,
    layers: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Tensor, float, float]:
    """An order of a symmetry's units that keeps more of the squared weight under the budget.

    `names` are the weights that count, all by default.

    Returns:
        `(units,)` the order, and the share kept before and after.
    """
    used = layers or {}
    weights = _matrices(symmetry, names)
    views = [_View(axis, block, used.get(axis.name) if axis.dim == 0 else None) for axis in weights]
    total = sum(float(view.importance.sum()) for view in views)
    units = torch.arange(symmetry.units, device=views[0].importance.device)
    if total == 0:
        return units, 1.0, 1.0

    def kept(order: Tensor) -> tuple[float, list[Tensor]]:
        sums = [view.blocks(order) for view in views]
        every = torch.cat([own.flatten() for own in sums])
        count = max(1, round(every.numel() * (1 - sparsity)))
        least = every.topk(count).values[-1]
        masks = [own >= least for own in sums]
        return sum(float(own[mask].sum()) for own, mask in zip(sums, masks, strict=True)) / total, masks

    before, masks = kept(units)
    if all(view.groups == 1 for view in views):
        return units, before, before
    best, best_order = before, units
    by_importance = torch.stack([view.importance.sum(1) for view in views]).sum(0).argsort(descending=True)
    share, other_masks = kept(by_importance)
    if share > before:
        best, best_order, masks = share, by_importance, other_masks
    for _ in range(ROUNDS):
        order = _assign(views, masks, symmetry.units)
        share, masks = kept(order)
        if share <= best * (1 + 1e-4):
            break
        best, best_order = share, order
    return best_order, before, best


def _matrices(symmetry: Symmetry, names: Collection[str] | None) -> list[Axis]:
    """The weights that a symmetry shows in, without biases; of these names only."""
    return [axis for axis in symmetry.axes if axis.tensor.dim() > 1 and (names is None or axis.name in names)]


def _whole(name: str) -> str:
    """The name of a weight from that of one of its matrices, at one kernel position."""
    return re.sub(r"\.position\.\d+$", "", name)


def _assign(views: Sequence[_View], masks: Sequence[Tensor], units: int) -> Tensor:
    """`(units,)` which unit each place gets: what it keeps there counts, those with most to lose choose first."""
    # Places that lie in the same blocks of all weights are worth the same.
    places = torch.stack([view.group for view in views], 1)
    kinds, kind = places.unique(dim=0, return_inverse=True)
    worth = torch.zeros(units, len(kinds), device=kinds.device)
    for i, (view, mask) in enumerate(zip(views, masks, strict=True)):
        worth += view.importance @ mask.to(view.importance).t()[:, kinds[:, i]]
    chosen = _fill(worth, torch.bincount(kind, minlength=len(kinds)).tolist())
    order = torch.empty(units, dtype=torch.int64, device=worth.device)
    by_kind = torch.tensor(chosen, device=worth.device).argsort(stable=True)
    order[kind.argsort(stable=True)] = by_kind
    return order


def _fill(worth: Tensor, room: list[int]) -> list[int]:
    """The kind of place of each unit, `worth` `(units, kinds)`, with room for so many of each kind."""
    values, ranking = worth.sort(1, descending=True)
    chosen = [0] * len(worth)
    preferences = ranking.tolist()
    at_stake = values[:, 0] - values[:, -1]
    for unit in at_stake.argsort(descending=True).tolist():
        for kind in preferences[unit]:
            if room[kind]:
                room[kind] -= 1
                chosen[unit] = kind
                break
    return chosen
