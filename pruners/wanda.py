"""Wanda in blocks: weights times the size of what they are multiplied with.

A weight's score is `|w_ij| * ||x_j||`, with `||x_j||` the root mean square of input feature j over the calibration
tokens: the change of the output if this weight alone went. Over a block of n own elements

    l1 (as in the paper, summed):   mean |w| ||x||             l2:   sqrt(mean (w ||x||)^2)

The square of `l2` is the mean of `w^2 E[x^2]`, which is the expected output error of removing the block if its
input features were uncorrelated; `block_obs` is what takes their correlations into account.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (2024). The paper
compares the weights of one output; `relative` divides by the layer's own size instead, for budgets over all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.blocks import block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner

NORMS = ("l1", "l2")


class Wanda(Pruner):
    """Scores a block by its weights times the root mean square of their input features.

    Args:
        norm: `"l1"` or `"l2"`.
        relative: Whether to divide by the root mean square over the whole layer, so that under a global budget
            layers with small weights or inputs do not lose more than others.

    Raises:
        PrunerError: If the norm is unknown.
    """

    name = "wanda"
    requires = frozenset({"input_sq"})

    def __init__(self, norm: str = "l1", relative: bool = True) -> None:
        if norm not in NORMS:
            raise PrunerError(f"norm {norm!r} is unknown: choose one of {', '.join(NORMS)}")
        self.norm = norm
        self.relative = relative

    def score(self, layer: PrunableLayer) -> Tensor:
        """Normalised norm of each block of `|W| ||x||`, `(R, C)` float32 on the weight's device.

        Raises:
            PrunerError: If the weight holds NaN or infinity.
        """
        weight = layer.weight.float()
        if not bool(torch.isfinite(weight).all()):
            raise PrunerError(
                f"weights of layer {layer.name} hold NaN or infinity: the checkpoint is damaged"
            )
        seen = weight.abs() * layer.statistics["input_sq"].to(weight.device).sqrt()
        blocks = to_blocks(seen, layer.block)
        sizes = block_sizes(layer.shape, layer.block).to(blocks.device)
        total = blocks.sum((2, 3)) if self.norm == "l1" else blocks.square().sum((2, 3))
        score = total / sizes if self.norm == "l1" else (total / sizes).sqrt()
        if self.relative:
            score = score / seen.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return score
