"""Movement pruning in blocks: the blocks that training moves towards zero go, however large they still are.

Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), with scores of blocks after Lagunas,
Charlaix, Sanh, Rush, "Block Pruning For Faster Transformers" (2021). Over the steps t of training a block b gathers

    S_b = - sum_t  mean over its elements of  w_t * dL/dw_t

which is what gradient descent on the score of a block's mask comes to: it grows while the step `-dL/dw` points away
from zero, and falls while it points towards zero. `dL/dw` is the gradient of the effective weight, so a block that is
masked keeps its weights and is still scored; one that turns out to be needed comes back as it was.

The network trains under the mask of the current scores. Its sparsity stays 0 for the share `warmup` of the phase,
rises to the target by the cubic ramp of Zhu & Gupta (2017), and holds it for the last share `settle`, in which blocks
may still change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner, ramped

if TYPE_CHECKING:
    from sparsify.pruner import Budget


class Movement(Pruner):
    """Keeps the blocks that fine-tuning moves away from zero.

    Args:
        warmup: Share of the phase before the first block is masked, 0 to 1.
        settle: Share of the phase, at its end, that has the target sparsity; `warmup + settle` is at most 1.

    Raises:
        PrunerError: If a share is out of range.
    """

    name = "movement"
    in_training = True

    def __init__(self, warmup: float = 0.1, settle: float = 0.3) -> None:
        for option, value in (("warmup", warmup), ("settle", settle)):
            if not 0.0 <= value <= 1.0:
                raise PrunerError(
                    f"{option} {value} is out of range: it is a share of the phase, from 0 to 1"
                )
        if warmup + settle > 1.0:
            raise PrunerError(
                f"warmup {warmup} and settle {settle} are more than the phase: lower one of them"
            )
        self.warmup, self.settle = warmup, settle
        self._budget: Budget | None = None
        self._last: dict[str, BlockMask] = {}

    def score(self, layer: PrunableLayer) -> Tensor:
        """`S_b`, `(R, C)` float32 on the weight's device.

        Raises:
            PrunerError: If no step was seen.
        """
        if "movement" not in layer.statistics:
            raise PrunerError(
                f"movement has seen no gradient of layer {layer.name}: it works during training, "
                f"as the `pruner` of a finetune stage"
            )
        return layer.statistics["movement"]

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        """Sets the budget that is met from `progress = 1 - settle` on."""
        self._budget, self._last = budget, {}
        if progress == 0.0:
            for layer in layers:
                layer.statistics.pop("movement", None)

    @torch.no_grad()
    def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Adds this step's movement to each layer's statistic `movement`.

        A gradient that overflowed is left out, as the optimizer's step is when float16 training meets one.

        Raises:
            PrunerError: If a layer has no gradient.
        """
        for layer in layers:
            if layer.grad is None:
                raise PrunerError(f"layer {layer.name} has no gradient: train its weight, or leave it out")
            moved = -to_blocks(layer.weight * layer.grad, layer.block).float().sum((2, 3))
            moved /= block_sizes(layer.shape, layer.block).to(moved.device)
            total = layer.statistics.setdefault("movement", torch.zeros_like(moved))
            if bool(torch.isfinite(moved).all()):
                total += moved

    def masks(self, layers: Sequence[PrunableLayer], progress: float) -> dict[str, BlockMask] | None:
        """The blocks with the highest scores, at the sparsity that the ramp has reached; `None` if they are the same.

        Raises:
            PrunerError: If `begin` was not called.
        """
        if self._budget is None:
            raise PrunerError("movement has no budget: call begin(layers, budget) before the first step")
        if progress <= self.warmup < 1.0:
            return None
        rising = 1.0 - self.settle - self.warmup
        share = min((progress - self.warmup) / rising, 1.0) if rising > 0.0 else 1.0
        masks = ramped(self._budget, share).masks({layer.name: self.score(layer) for layer in layers}, layers)
        if self._last and all(torch.equal(mask.keep, self._last[name].keep) for name, mask in masks.items()):
            return None
        self._last = masks
        return masks
