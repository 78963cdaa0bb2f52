"""How much each layer keeps, for the scopes that give every layer a density of its own.

All of them meet one budget, `sum_l d_l n_l = (1 - sparsity) sum_l n_l` over layers of `n_l` elements and density `d_l`,
with every `d_l` between the floor and the ceiling; what one layer cannot take or give goes to the others.

`erdos_renyi`: `d_l = t (R_l + C_l) / (R_l C_l)` for a weight of `R_l x C_l` blocks, `t` set by the budget: the
smaller a layer, the denser. The Erdos-Renyi-Kernel rule of RigL (Evci, Gale, Menick, Castro, Elsen, "Rigging the
Lottery: Making All Tickets Winners", 2020, appendix), whose kernels have one element here, with blocks for weights.

`outlier`: OWL (Yin et al., "Outlier Weighed Layerwise Sparsity", 2023). `D_g` is the share of elements of the
transformer block `g` whose `|w_ij| ||x_j||` exceeds `OUTLIER` times the mean of their own weight matrix; all layers of
the block get `d = t + SPREAD (2 (D_g - min D) / (max D - min D) - 1)`, `t` set by the budget.

`sensitivity`: densities that minimise `sum_l L_l(1 - d_l)`, where `L_l(s)` is what the loss rises by when the layer
alone loses the share `s` of its elements (`sparsify sensitivity` measures that). `L_l` is taken as the lower convex
hull of its points, from 0 at `s = 0` and at the last slope beyond the last point; then removing along the flattest
segment that is left, until the budget is met, is the exact minimum (Everett's generalised Lagrange multipliers, 1963).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparsify.errors import ConfigError
from sparsify.pruner import PrunableLayer

OUTLIER, SPREAD = 5.0, 0.08
# Loss increase by sparsity, for one layer.
Curve = Mapping[float, float]


def erdos_renyi(
    layers: Sequence[PrunableLayer], sparsity: float, floor: float, ceiling: float
) -> list[float]:
    """Density of each layer, 0 to 1, by the number of its block rows and columns.

    Args:
        layers: The layers.
        sparsity: Share of all their elements to remove.
        floor: Lowest density of a layer.
        ceiling: Highest density of a layer.
    """
    wanted = [sum(layer.grid) / (layer.grid[0] * layer.grid[1]) for layer in layers]
    top = 1.0 / min(wanted)  # where the last layer reaches a density of 1
    return _fit(lambda t: [t * share for share in wanted], (0.0, top), layers, sparsity, floor, ceiling)


def proportional(
    layers: Sequence[PrunableLayer],
    proportions: Sequence[float],
    sparsity: float,
    floor: float,
    ceiling: float,
) -> list[float]:
    """Density of each layer, 0 to 1, in the proportions given as far as the bounds allow.

    Args:
        layers: The layers.
        proportions: One number for each, not negative.
        sparsity: Share of all their elements to remove.
        floor: Lowest density of a layer.
        ceiling: Highest density of a layer.

    Raises:
        ConfigError: If a proportion is negative, NaN or infinite, or those that are zero make the budget impossible.
    """
    wanted = [float(share) for share in proportions]
    if len(wanted) != len(layers):
        raise ConfigError(f"{len(wanted)} proportions for {len(layers)} layers: give one for each")
    for layer, share in zip(layers, wanted, strict=True):
        if not 0.0 <= share < float("inf"):
            raise ConfigError(
                f"the proportion {share:g} of layer {layer.name} is out of range: it must be at least 0"
            )
    top = ceiling / min((share for share in wanted if share > 0.0), default=1.0)
    found = _fit(lambda t: [t * share for share in wanted], (0.0, top), layers, sparsity, floor, ceiling)
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    mean = sum(density * size for density, size in zip(found, sizes, strict=True)) / sum(sizes)
    if mean < 1.0 - sparsity - 1e-6:
        raise ConfigError(
            f"no densities in these proportions keep {1.0 - sparsity:g} of the weights: with floor {floor:g} and "
            f"ceiling {ceiling:g} they keep {mean:.3g} at most; fewer of them may be 0"
        )
    return found


def outlier(layers: Sequence[PrunableLayer], sparsity: float, floor: float, ceiling: float) -> list[float]:
    """Density of each layer, 0 to 1, by the outliers of its transformer block; arguments as in `erdos_renyi`.

    Raises:
        ConfigError: If a layer has no statistic `input_sq`.
    """
    found: dict[str, list[int]] = {}
    for layer in layers:
        counts = found.setdefault(_transformer_block(layer.name), [0, 0])
        counts[0] += _outliers(layer)
        counts[1] += layer.shape[0] * layer.shape[1]
    shares = {group: count / elements for group, (count, elements) in found.items()}
    low, high = min(shares.values()), max(shares.values())
    scale = 2 * SPREAD / (high - low) if high > low else 0.0
    wanted = [scale * (shares[_transformer_block(layer.name)] - low) for layer in layers]
    return _fit(
        lambda t: [t + share for share in wanted], (-2 * SPREAD, 1.0), layers, sparsity, floor, ceiling
    )


def sensitivity(
    layers: Sequence[PrunableLayer],
    curves: Mapping[str, Curve],
    sparsity: float,
    floor: float,
    ceiling: float,
) -> list[float]:
    """Density of each layer, 0 to 1, that together cost the least loss; arguments as in `erdos_renyi`.

    Args:
        layers: The layers.
        curves: By layer name, the increase of the loss at each sparsity measured.
        sparsity: Share of all their elements to remove.
        floor: Lowest density of a layer.
        ceiling: Highest density of a layer.

    Raises:
        ConfigError: If a layer has no curve.
    """
    segments: list[tuple[float, int, float]] = []
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    removed = [(1.0 - ceiling) * size for size in sizes]
    for index, layer in enumerate(layers):
        if layer.name not in curves:
            raise ConfigError(
                f"the sensitivity of layer {layer.name} was not measured: run `sparsify sensitivity` with the same "
                f"targets and ignore"
            )
        hull = _lower_hull(curves[layer.name])
        for (start, low), (end, high) in pairwise(hull):
            inside = min(end, 1.0 - floor) - max(start, 1.0 - ceiling)
            if inside > 0:
                slope = (high - low) / ((end - start) * sizes[index])
                segments.append((slope, index, inside * sizes[index]))
    left = sparsity * sum(sizes) - sum(removed)
    for _, index, elements in sorted(segments):
        taken = min(elements, max(left, 0.0))
        removed[index] += taken
        left -= taken
    return [1.0 - gone / size for gone, size in zip(removed, sizes, strict=True)]


def _fit(
    densities: Callable[[float], list[float]],
    interval: tuple[float, float],
    layers: Sequence[PrunableLayer],
    sparsity: float,
    floor: float,
    ceiling: float,
) -> list[float]:
    """Bounded densities at the level `t` that meets the budget; `densities` rises with `t`."""
    sizes = torch.tensor([layer.shape[0] * layer.shape[1] for layer in layers], dtype=torch.float64)

    def bounded(level: float) -> Tensor:
        return torch.tensor(densities(level), dtype=torch.float64).clamp(floor, ceiling)

    target = (1.0 - sparsity) * float(sizes.sum())
    low, high = interval
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        if float((bounded(middle) * sizes).sum()) < target:
            low = middle
        else:
            high = middle
    return bounded(high).tolist()


def _outliers(layer: PrunableLayer) -> int:
    """Number of elements of a weight whose product with the size of their input stands out."""
    if "input_sq" not in layer.statistics:
        raise ConfigError(
            f"the scope 'outlier' needs the statistic 'input_sq' of layer {layer.name}: put a calibrate stage before "
            f"the pruning (with `sparsify prune` give --data, in Python `calibration`)"
        )
    inputs = layer.statistics["input_sq"].to(layer.weight.device).sqrt()
    seen = layer.weight.float().abs() * inputs
    return int((seen > OUTLIER * seen.mean()).sum())


def _transformer_block(name: str) -> str:
    """The name of a layer up to its first number, which counts the repeated blocks; without one all of it."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else name


def _lower_hull(curve: Curve) -> list[tuple[float, float]]:
    """Corners of the largest convex rising function under the points, from sparsity 0 to 1."""
    points, highest = [(0.0, 0.0)], 0.0
    for sparsity, increase in sorted(curve.items()):
        highest = max(
            highest, increase
        )  # the loss never falls by removing more; where it seems to, that is noise
        points.append((sparsity, highest))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    if len(hull) > 1 and hull[-1][0] < 1.0:
        (sparsity, increase), slope = hull[-1], _slope(hull[-2], hull[-1])
        hull.append((1.0, increase + slope * (1.0 - sparsity)))
    return hull


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
