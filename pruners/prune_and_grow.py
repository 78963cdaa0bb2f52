"""Prune and grow: the mask is searched while the network trains under it, at no time denser than it has to be.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners" (RigL, 2020), in blocks. Each time
the share `every` of the phase has passed, every layer drops the share

    f(p) = fraction / 2 * (1 + cos(pi * p / until))

of its kept blocks, those of the lowest root mean square, and as many blocks grow in their place: those where the
gradient of the effective weight, masked blocks included, is largest (root mean square, gathered over the steps since
the last exchange). What grows starts from zero, so that the network computes the same before and after; a block
dropped may grow back at once, and then keeps its weights. Under a global budget layers compete for what grows.

RigL holds the target sparsity from the first step, which is `ramp: 0` and meant for training from scratch. For a
pretrained network the sparsity rises to the target over the share `ramp` of the phase, by the cubic of Zhu & Gupta
(2017), as in BLaST (Okanovic et al., "BLaST: High Performance Inference and Pretraining using BLock Sparse
Transformers", 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.blocks import BlockMask, block_sizes, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner, ramped

if TYPE_CHECKING:
    from sparsify.pruner import Budget


class PruneAndGrow(Pruner):
    """Exchanges the smallest kept blocks for those with the largest gradients while the network trains.

    Args:
        fraction: Share of a layer's kept blocks dropped in an exchange at first, 0 to 1.
        every: Share of the phase between two exchanges, above 0 and at most 1.
        until: Share of the phase after which the mask stays, above 0 and at most 1.
        ramp: Share of the phase over which the sparsity rises to the target, at most `until`; 0 for training from
            scratch.

    Raises:
        PrunerError: If a share is out of range.
    """

    name = "prune_and_grow"
    in_training = True

    def __init__(
        self, fraction: float = 0.3, every: float = 0.02, until: float = 0.75, ramp: float = 0.5
    ) -> None:
        for option, value in (("fraction", fraction), ("ramp", ramp)):
            if not 0.0 <= value <= 1.0:
                raise PrunerError(f"{option} {value} is out of range: it is a share, from 0 to 1")
        for option, value in (("every", every), ("until", until)):
            if not 0.0 < value <= 1.0:
                raise PrunerError(f"{option} {value} is out of range: it is a share, above 0 and at most 1")
        if ramp > until:
            raise PrunerError(
                f"ramp {ramp} is longer than until {until}: the mask would stay before it is sparse"
            )
        self.fraction, self.every, self.until, self.ramp = fraction, every, until, ramp
        self._budget: Budget | None = None
        self._done = 0.0
        self._changed = False

    def score(self, layer: PrunableLayer) -> Tensor:
        """Kept blocks before all others, larger before smaller: `2 keep + r / (1 + r)`, r the root mean square.

        Raises:
            PrunerError: If training has not begun.
        """
        if "keep" not in layer.statistics:
            raise PrunerError(
                f"prune_and_grow has no mask of layer {layer.name} yet: it works during training, "
                f"as the `pruner` of a finetune stage"
            )
        return _ranked(layer.statistics["keep"], _rms(layer, layer.weight))

    def begin(self, layers: Sequence[PrunableLayer], budget: Budget, progress: float = 0.0) -> None:
        """Sets the budget, and starts with the largest blocks unless a resumed run brought its mask."""
        self._budget, self._done, self._changed = budget, progress, True
        if progress == 0.0 or not all("keep" in layer.statistics for layer in layers):
            for layer in layers:
                layer.statistics.pop("growth", None)
            self._keep(layers, {layer.name: _rms(layer, layer.weight) for layer in layers}, progress)

    @torch.no_grad()
    def before_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Adds the mean square of each block's gradient to the layer's statistic `growth` `(R, C)`.

        Raises:
            PrunerError: If a layer has no gradient.
        """
        for layer in layers:
            if layer.grad is None:
                raise PrunerError(f"layer {layer.name} has no gradient: train its weight, or leave it out")
            square = _rms(layer, layer.grad).square()
            total = layer.statistics.setdefault("growth", torch.zeros_like(square))
            if bool(
                torch.isfinite(square).all()
            ):  # float16 training skips a step that overflowed, and so do we
                total += square

    @torch.no_grad()
    def after_step(self, layers: Sequence[PrunableLayer], progress: float) -> None:
        """Exchanges blocks if it is time; each layer's statistic `keep` `(R, C)` bool is its mask.

        Raises:
            PrunerError: If `begin` was not called, or weights became NaN or infinite.
        """
        if self._budget is None:
            raise PrunerError(
                "prune_and_grow has no budget: call begin(layers, budget) before the first step"
            )
        turn, last = (math.floor(p / self.every + 1e-6) for p in (progress, self._done))
        self._done = progress
        if turn == last or last * self.every > self.until - 1e-6:
            return
        dropped = self.fraction / 2 * (1 + math.cos(math.pi * min(progress / self.until, 1.0)))
        before = {layer.name: layer.statistics["keep"] for layer in layers}
        scores = {}
        for layer in layers:
            stays, size = before[layer.name].clone(), _rms(layer, layer.weight)
            smallest = size.masked_fill(~stays, math.inf).flatten().argsort(stable=True)
            stays.view(-1)[smallest[: round(dropped * int(stays.sum()))]] = False
            gradient = layer.statistics["growth"].sqrt()
            scores[layer.name] = _ranked(stays, torch.where(stays, size, gradient))
        self._keep(layers, scores, progress)
        for layer in layers:
            grown = BlockMask(layer.statistics["keep"] & ~before[layer.name], layer.shape, layer.block)
            layer.weight.masked_fill_(grown.elements(), 0.0)
            layer.statistics["growth"] = torch.zeros_like(layer.statistics["growth"])

    def masks(self, layers: Sequence[PrunableLayer], progress: float) -> dict[str, BlockMask] | None:
        """The masks of all layers if they have changed since the last call, on the CPU."""
        changed, self._changed = self._changed, False
        if not changed:
            return None
        keep = {layer.name: layer.statistics["keep"].cpu() for layer in layers}
        return {layer.name: BlockMask(keep[layer.name], layer.shape, layer.block) for layer in layers}

    def _keep(self, layers: Sequence[PrunableLayer], scores: dict[str, Tensor], progress: float) -> None:
        """Keeps the blocks with the highest scores, at the sparsity that the ramp has reached."""
        assert self._budget is not None
        now = ramped(self._budget, min(progress / self.ramp, 1.0) if self.ramp else 1.0)
        masks = now.masks(scores, layers)
        for layer in layers:
            layer.statistics["keep"] = masks[layer.name].keep.to(layer.parameter.device)
        self._changed = True


def _rms(layer: PrunableLayer, matrix: Tensor) -> Tensor:
    """Root mean square of each block of the layer's weight or gradient `(N, K)`; `(R, C)` float32."""
    square = to_blocks(matrix, layer.block).float().square().sum((2, 3))
    return (square / block_sizes(layer.shape, layer.block).to(square.device)).sqrt()


def _ranked(first: Tensor, value: Tensor) -> Tensor:
    """Scores that put the blocks of `first` before all others, and otherwise go by `value`, which is not negative."""
    return 2.0 * first + value / (1.0 + value)
