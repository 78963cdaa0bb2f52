"""Group lasso on blocks: training shrinks whole blocks towards zero until the target sparsity is reached.

The penalty is `sum_b t_b ||w_b||` over the blocks b of a weight, with `t_b` proportional to the square root of the
block's size (Yuan & Lin, "Model selection and estimation in regression with grouped variables", 2006). It is not added
to the loss, where Adam would rescale it, but applied after each optimizer step by its proximal operator

    w_b <- w_b * max(0, 1 - t_b / ||w_b||)

which takes the same amount off the root mean square of every block, `t = t_b / sqrt(size)`, and makes blocks exactly
zero. The strength needs no tuning. With `q` the score that separates kept from removed blocks if the budget were
enforced now, and `n` steps of the phase left, a step takes off `t = q / n`: what the loss does not defend arrives at
zero with the last step. A block that the loss pushes above the rest stays, and another one takes its place.

Only the blocks that are being removed are shrunk, unless `shrink_all` is set: the trimmed penalty (Yun, Zheng, Yang,
Lozano, Aravkin, "Trimming the l1 Regularizer", 2019) spares kept blocks the bias of the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.blocks import block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner

if TYPE_CHECKING:
    from sparsify.pruner import Budget


class GroupLasso(Pruner):
    """Shrinks blocks during training; `begin` gives it the budget, each `after_step` is one proximal step.

    Args:
        shrink_all: Whether to shrink kept blocks as well, by the same amount: the plain group lasso.
    """

    name = "group_lasso"

    def __init__(self, shrink_all: bool = False) -> None:
        self.shrink_all = shrink_all
        self._budget: Budget | None = None
        self._done = 0.0

    def score(self, layer: PrunableLayer) -> Tensor:
        """Root mean square of each block's own elements, `(R, C)` float32 on the weight's device."""
        blocks = to_blocks(layer.weight, layer.block).float()
        sizes = block_sizes(layer.shape, layer.block).to(blocks.device)
        return (blocks.square().sum((2, 3)) / sizes).sqrt()

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        """Sets the budget to arrive at when progress is 1."""
        self._budget, self._done = budget, progress

    @torch.no_grad()
    def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Takes one proximal step.

        Raises:
            PrunerError: If `begin` was not called, or weights became NaN or infinite.
        """
        if self._budget is None:
            raise PrunerError("group_lasso has no budget: call begin(layers, budget) before the first step")
        left = 1.0 - self._done
        share = min(max((progress - self._done) / left, 0.0), 1.0) if left > 0.0 else 1.0
        self._done = progress
        scores = {layer.name: self.score(layer) for layer in layers}
        masks = self._budget.masks(scores, layers)
        for layer in layers:
            keep, score = masks[layer.name].keep.to(layer.weight.device), scores[layer.name]
            if bool(keep.all()):
                continue
            threshold = score.masked_fill(keep, 0.0)
            # Under the row scope every block row has a threshold of its own.
            threshold = threshold.amax(1, keepdim=True) if self._budget.scope == "row" else threshold.amax()
            factor = (1.0 - share * threshold / score).nan_to_num(0.0).clamp_min(0.0)
            if not self.shrink_all:
                factor = factor.masked_fill(keep, 1.0)
            rows, cols = layer.shape
            wide = factor.repeat_interleave(layer.block.rows, 0).repeat_interleave(layer.block.cols, 1)
            layer.weight.mul_(wide[:rows, :cols])
