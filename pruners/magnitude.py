"""Magnitude pruning in blocks: the blocks with the smallest weights go.

The norm of a block is divided by what it would be if every weight of it were 1, so that a block cut off at the
weight's edge is judged by its own elements and blocks of different shapes compare:

    l1:   mean |w|             l2:   sqrt(mean w^2)             max:   max |w|

Source: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks" (2015); for
groups of weights: Li et al., "Pruning Filters for Efficient ConvNets" (2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.blocks import block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner

NORMS = ("l1", "l2", "max")


class Magnitude(Pruner):
    """Scores a block by a norm of its weights, normalised for its size.

    Args:
        norm: `"l1"`, `"l2"` or `"max"`.
        relative: Whether to divide by the whole layer's root mean square, so that under a global budget layers
            with small weights do not lose more than others.

    Raises:
        PrunerError: If the norm is unknown.
    """

    name = "magnitude"

    def __init__(self, norm: str = "l2", relative: bool = False) -> None:
        if norm not in NORMS:
            raise PrunerError(f"norm {norm!r} is unknown: choose one of {', '.join(NORMS)}")
        self.norm = norm
        self.relative = relative

    def score(self, layer: PrunableLayer) -> Tensor:
        """Normalised norm of each block, `(R, C)` float32 on the weight's device.

        Raises:
            PrunerError: If the weight holds NaN or infinity.
        """
        weight = layer.weight
        blocks = to_blocks(weight, layer.block).float()
        sizes = block_sizes(layer.shape, layer.block).to(blocks.device)
        if self.norm == "max":
            score = blocks.abs().amax((2, 3))
        elif self.norm == "l1":
            score = blocks.abs().sum((2, 3)) / sizes
        else:
            score = (blocks.square().sum((2, 3)) / sizes).sqrt()
        if not bool(torch.isfinite(score).all()):
            raise PrunerError(
                f"weights of layer {layer.name} hold NaN or infinity: the checkpoint is damaged"
            )
        if self.relative:
            rms = weight.float().square().mean().sqrt()
            score = score / rms.clamp_min(torch.finfo(torch.float32).tiny)
        return score
