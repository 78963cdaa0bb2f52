"""Whether a layer is worth being block-sparse on this machine, predicted from what `sparsify tune` measured of it.

A layer serves few tokens at a time (decoding) and many (prompts, batches, training), and may win at one and lose at
the other. What counts is the geometric mean of both: a loss at one must be made up for at the other. See
docs/decisions/0006-dense-where-slower.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsify.blocks import BlockShape
from sparsify.kernels import tuning

FEW, MANY = (1, 16), (256, 2048)
# Sparser than this nobody asks for a break-even.
MOST_SPARSE = 0.99


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a block-sparse layer over a dense one.

    Attributes:
        speedups: By token count; only those near which something was measured.
    """

    speedups: Mapping[int, float]

    @property
    def overall(self) -> float:
        """Geometric mean over few and many tokens, each side counting the same."""
        sides = [[self.speedups[m] for m in side if m in self.speedups] for side in (FEW, MANY)]
        return _mean([_mean(side) for side in sides if side])

    @property
    def slower(self) -> bool:
        """Whether dense is faster, all in all."""
        return self.overall < 1

    def __str__(self) -> str:
        each = ", ".join(f"{ratio:.2f}x at {_tokens(m)}" for m, ratio in self.speedups.items())
        return f"{self.overall:.2f}x the speed of dense ({each})"


def predict(
    device: torch.device, dtype: torch.dtype, block: BlockShape, shape: tuple[int, int], density: float
) -> Prediction | None:
    """What a layer would gain or lose here.

    Args:
        device: Where it would run.
        dtype: Of its weights and activations.
        block: Block shape.
        shape: `(N, K)` of the weight.
        density: Share of the weight that is stored, 0 to 1.

    Returns:
        `None` if nothing like it was measured on this machine.
    """
    sides = block.rows, block.cols
    found = {m: tuning.speedup(device, dtype, sides, shape, density, m) for m in (*FEW, *MANY)}
    known = {m: ratio for m, ratio in found.items() if ratio is not None}
    return Prediction(known) if known else None


def break_even(
    device: torch.device, dtype: torch.dtype, block: BlockShape, shape: tuple[int, int], above: float = 0.0
) -> float | None:
    """The smallest sparsity, in whole percent, at which a layer is predicted no slower than dense.

    Args:
        device: Where it would run.
        dtype: Of its weights and activations.
        block: Block shape.
        shape: `(N, K)` of the weight.
        above: Sparsity to begin from.

    Returns:
        A share from 0 to 0.99; `None` if no measured sparsity is high enough.
    """
    for percent in range(math.ceil(100 * above - 1e-9), round(100 * MOST_SPARSE) + 1):
        prediction = predict(device, dtype, block, shape, 1 - percent / 100)
        if prediction is not None and not prediction.slower:
            return percent / 100
    return None


def warning(
    device: torch.device,
    dtype: torch.dtype,
    block: BlockShape,
    shapes: Sequence[tuple[int, int]],
    sparsity: float,
) -> str | None:
    """One line about layers that are predicted to lose at a sparsity, and where they break even.

    Args:
        device: Where they would run.
        dtype: Of their weights and activations.
        block: Block shape.
        shapes: `(N, K)` of each layer.
        sparsity: What is asked for, 0 to 1.

    Returns:
        `None` if none is predicted to lose.
    """
    predicted = {shape: predict(device, dtype, block, shape, 1 - sparsity) for shape in set(shapes)}
    losing = {shape: each.overall for shape, each in predicted.items() if each is not None and each.slower}
    if not losing:
        return None
    count, low, high = sum(shape in losing for shape in shapes), min(losing.values()), max(losing.values())
    found = [break_even(device, dtype, block, shape, sparsity) for shape in losing]
    where = [share for share in found if share is not None]
    if not where:
        even = "and break even at no measured sparsity"
    elif len(where) < len(found) or min(where) == max(where):
        even = f"and break even at {max(where):.0%}" + (" or not at all" if len(where) < len(found) else "")
    else:
        even = f"and break even at {min(where):.0%} to {max(where):.0%}"
    speed = f"{low:.2f}x" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}x to {high:.2f}x"
    return (
        f"at {sparsity:.0%} sparsity {count} of {len(shapes)} layers in blocks of {block} are predicted to run at "
        f"{speed} the speed of dense on this machine, {even}; more sparsity or larger blocks pay"
    )


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else str(count)
