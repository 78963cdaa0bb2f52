"""Group lasso on blocks: training shrinks whole blocks to zero until the target sparsity is reached.

The penalty is `sum_b t_b ||w_b||` over blocks b, with `t_b` proportional to the square root of the block's size
(Yuan & Lin, "Model selection and estimation in regression with grouped variables", 2006). It is not added to the loss,
where Adam would rescale it, but applied after each optimizer step by its proximal operator

    w_b <- w_b * max(0, 1 - t_b / ||w_b||)

which takes the same `t` off the root mean square of every block, edge blocks too, and makes blocks exactly zero.

Only blocks that the budget would remove are penalised: the trimmed form (Yun, Zheng, Yang, Lozano, Aravkin, "Trimming
the l1 Regularizer", 2019), which spares what is kept the lasso's bias. At progress `p` of the phase these are the
blocks that a sparsity of `target * (1 - (1 - p / (1 - fade))^3)` removes (the ramp of Zhu & Gupta, "To prune, or not to
prune", 2017): few at a time, fewer towards the end, so that the network can adapt; all of them from `p = 1 - fade` on.

The strength needs no tuning. With `q` the highest score among the blocks to be removed, and `fade` the share of the
phase that each of them may take, a step takes `t = q * step / fade` off. Near the end of the phase what is left of it
takes the place of `fade`, so that the last step ends at zero. Also taken off is what the optimizer has added to such a
block since the step before: Adam moves a weight by about the learning rate however small its gradient, and would keep
any block alive that is smaller than that. Until a block is among the lowest, the loss alone decides where it ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.blocks import block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner, ramped

if TYPE_CHECKING:
    from sparsify.pruner import Budget


class GroupLasso(Pruner):
    """Shrinks whole blocks to zero while the network trains.

    `begin` gives it the budget, each `after_step` is one proximal step.

    Args:
        fade: Share of the phase, above 0 and at most 1, over which a block shrinks to zero. Longer is gentler on
            the block, but leaves less of the phase to train without it.

    Raises:
        PrunerError: If `fade` is out of range.
    """

    name = "group_lasso"
    in_training = True
    # Share of the phase, in units of `fade`, that is left when the last blocks come under the penalty.
    _margin = 1.5

    def __init__(self, fade: float = 0.1) -> None:
        if not 0.0 < fade <= 1.0:
            raise PrunerError(
                f"fade {fade} is out of range: it is a share of the phase, above 0 and at most 1"
            )
        self.fade = fade
        self._budget: Budget | None = None
        self._done = 0.0

    def score(self, layer: PrunableLayer) -> Tensor:
        """Root mean square of each block's own elements, `(R, C)` float32 on the weight's device."""
        blocks = to_blocks(layer.weight, layer.block).float()
        sizes = block_sizes(layer.shape, layer.block).to(blocks.device)
        return (blocks.square().sum((2, 3)) / sizes).sqrt()

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        """Sets the budget that is met when progress is 1."""
        self._budget, self._done = budget, progress
        if progress == 0.0:
            for layer in layers:
                layer.statistics.pop("rms", None)
                layer.statistics.pop("start", None)

    @torch.no_grad()
    def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Takes one proximal step.

        Each layer's statistic `rms` `(R, C)` is what it leaves of the blocks, `start` `(R, C)` the score with which a
        vanishing one came under the penalty, 0 for all others.

        Raises:
            PrunerError: If `begin` was not called, or weights became NaN or infinite.
        """
        if self._budget is None:
            raise PrunerError("group_lasso has no budget: call begin(layers, budget) before the first step")
        left = min(self.fade, 1.0 - self._done)
        share = min((progress - self._done) / left, 1.0) if progress < 1.0 else 1.0
        self._done = progress
        scores = {layer.name: self.score(layer) for layer in layers}
        final = self._budget.masks(scores, layers)
        rising = 1.0 - self._margin * self.fade
        now = ramped(self._budget, progress / rising if progress < rising else 1.0).masks(scores, layers)
        for layer in layers:
            score = scores[layer.name]
            # Rounded in another way, the lower budget may remove a block that the whole one keeps.
            keep = (now[layer.name].keep | final[layer.name].keep).to(score.device)
            before = torch.minimum(score, layer.statistics.get("rms", score))
            start = layer.statistics.get("start", torch.zeros_like(score))
            start = torch.where(start > 0.0, start, before).masked_fill(keep | (before == 0.0), 0.0)
            # Under the row scope every block row has a threshold of its own.
            threshold = start.amax(1, keepdim=True) if self._budget.scope == "row" else start.amax()
            after = torch.where(keep, score, (before - share * threshold).clamp_min(0.0))
            layer.statistics.update(rms=after, start=start)
            if not bool(keep.all()):
                _scale(layer, torch.where(keep | (score == 0.0), 1.0, after / score))


def _scale(layer: PrunableLayer, factor: Tensor) -> None:
    """Multiplies each block of the weight by its entry of `factor` `(R, C)`."""
    rows, cols = layer.shape
    wide = factor.repeat_interleave(layer.block.rows, 0).repeat_interleave(layer.block.cols, 1)
    layer.weight.mul_(wide[:rows, :cols])
