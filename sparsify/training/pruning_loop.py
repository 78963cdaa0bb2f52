"""A pruner driven from one optimizer step to the next, whatever does the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask
from sparsify.errors import CheckpointError, ConfigError
from sparsify.masking import current_masks, mask_gradients, mask_model
from sparsify.pruner import PrunableLayer, Pruner, is_cubic, ramped
from sparsify.training.sharding import agreed, gathered, rebind

# Mask updates of a cubic schedule in the whole phase, where `every` does not say how many steps lie between two.
UPDATES = 100


class PruningLoop:
    """Drives a pruner through the three phases of a training.

    Warm-up: the dense network trains by itself. Pruning: the pruner's `before_step` and `after_step` are called around
    each optimizer step, and the layers are trained under the masks that the schedule gives. Healing: the last scores
    have become the exact masks, `update_weights` may have compensated, and the layers are masked for good.

    The schedule is the pruner's own, or else the cubic ramp of Zhu & Gupta (2017): every few steps the budget that the
    ramp has reached makes masks of the scores that the dense weights have then. What is masked keeps its weights, and
    comes back if its score is among the higher ones again, up to the last update.

    Under FSDP2 the pruner sees whole weights (`sparsify.training.sharding`): while it works, each process holds all
    pruned weights and their gradients.

    Args:
        pruner: The algorithm.
        layers: The layers to prune.
        budget: The sparsity to arrive at.
        until: Share of the training steps after which the masks are fixed, above 0 and at most 1.
        start: Share of the training steps before pruning begins, at least 0 and below `until`.
        schedule: `cubic`; `once`, all at the end of the phase; or `auto`, the pruner's own and else `cubic`.
        every: Optimizer steps between two updates of a cubic schedule; by default a hundredth of the phase.

    Attributes:
        masks: The fixed masks by layer name; `None` before the end of the pruning phase.
        step: Optimizer steps done.

    Raises:
        ConfigError: If a share or `every` is out of range, or the pruner has a schedule of its own.
    """

    def __init__(
        self,
        pruner: Pruner,
        layers: Sequence[PrunableLayer],
        budget: Budget,
        until: float = 1.0,
        start: float = 0.0,
        schedule: str = "auto",
        every: int | None = None,
    ) -> None:
        if not 0.0 < until <= 1.0:
            raise ConfigError(
                f"until {until} is out of range: it is a share of the steps, above 0 and at most 1"
            )
        if not 0.0 <= start < until:
            raise ConfigError(
                f"start {start} is out of range: it is a share of the steps, at least 0 and below until {until}"
            )
        self.pruner, self.layers, self.budget = pruner, list(layers), budget
        self.until, self.start = until, start
        self.cubic, self.every = is_cubic(pruner, schedule, every), every
        self.masks: dict[str, BlockMask] | None = None
        self.step = self.steps = 0
        self._model: nn.Module | None = None
        self._begun = False

    @property
    def model(self) -> nn.Module:
        """The model that is trained.

        Raises:
            ConfigError: If training has not begun.
        """
        if self._model is None:
            raise ConfigError("pruning has not begun: there is no model yet")
        return self._model

    def begin(self, model: nn.Module, steps: int, state: Mapping[str, Any] | None = None) -> None:
        """Starts, or goes on where an interrupted training had stored its state.

        Args:
            model: The model that will be trained, the very one that the layers are of.
            steps: Optimizer steps of the whole training.
            state: What `stored` gave, with the model as it was saved then.

        Raises:
            ConfigError: If the layers are of another model, or the phase has no room for two updates.
            CheckpointError: If the state is of other layers.
        """
        rebind(self.layers, model)
        self._model, self.steps, self.step, self._begun, self.masks = model, steps, 0, False, None
        if self.cubic and self.every is not None and self.every >= self.last - self._first:
            raise ConfigError(
                f"every {self.every} is no shorter than the pruning phase of {self.last - self._first} steps: the "
                f"masks would only be set at its end; lower `every`, or ask for that with schedule: once"
            )
        if state is not None:
            self._restore(state)
        if self.masks is None and self.step >= self._first:
            self._begin()

    def before_step(self) -> None:
        """Shows the pruner the whole gradient, then hides that of pruned blocks from the optimizer."""
        if self._begun and self.masks is None:
            with gathered(self.layers):
                self.pruner.before_step(self.layers, self._progress)
        mask_gradients(self.model)

    @torch.no_grad()
    def after_step(self) -> None:
        """Lets the pruner act on the new weights and sets new masks; fixes them at the end of the phase."""
        self.step += 1
        if self.masks is not None:
            return
        if not self._begun:
            if self.step >= self._first:
                self._begin()
            return
        progress = self._progress
        with gathered(self.layers, write=True):
            self.pruner.after_step(self.layers, progress)
            if progress >= 1.0:
                self.masks = agreed(self.budget.masks(self._scores(), self.layers), self.layers)
                for layer in self.layers:
                    self.pruner.update_weights(layer, self.masks[layer.name])
        if self.masks is not None:
            # Nobody looks at the gradient of pruned blocks any more, and clipping shall not count it.
            mask_model(self.model, self.masks, dense_gradient=False)
        else:
            self._mask()

    def stored(self) -> dict[str, Any]:
        """What a resumed training needs beside the model; all processes must call it.

        Returns:
            `step`; `masks` in force, by layer name; whether they are `fixed`; the layers' `statistics`; and the weights
            that masks hide, `hidden`, for the model's own `state_dict` has zeros there.
        """
        names = {layer.name for layer in self.layers}
        masks = {name: mask for name, mask in current_masks(self.model).items() if name in names}
        hidden = {}
        if self.masks is None:
            with gathered(self.layers if masks else []):
                hidden = {
                    layer.name: _hidden(layer, masks[layer.name])
                    for layer in self.layers
                    if layer.name in masks
                }
        statistics = {layer.name: dict(layer.statistics) for layer in self.layers if layer.statistics}
        return {
            "step": self.step,
            "fixed": self.masks is not None,
            "masks": masks,
            "statistics": statistics,
            "hidden": hidden,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        layers = {layer.name: layer for layer in self.layers}
        unknown = {*state["masks"], *state["statistics"], *state["hidden"]} - layers.keys()
        if unknown:
            raise CheckpointError(
                f"the stored state of pruning is of other layers, such as {min(unknown)}: resume with the settings "
                f"of the run that stored it"
            )
        self.step = state["step"]
        for name, statistics in state["statistics"].items():
            device = layers[name].parameter.device
            layers[name].statistics.update(
                {key: t.to(device) if t.dim() else t for key, t in statistics.items()}
            )
        if state["fixed"]:
            self.masks = dict(state["masks"])
        if state["masks"]:
            mask_model(self.model, state["masks"], dense_gradient=not state["fixed"])
            self._restore_hidden(state["hidden"], state["masks"])

    @torch.no_grad()
    def _restore_hidden(self, hidden: Mapping[str, Tensor], masks: Mapping[str, BlockMask]) -> None:
        """Puts back what the model's own files hold zeros for."""
        with gathered(self.layers if hidden else [], write=True):
            for layer in self.layers:
                if layer.name in hidden:
                    weight, keep = layer.weight, masks[layer.name].elements()
                    saved = hidden[layer.name].to(weight)
                    weight.copy_(torch.where(keep.to(weight.device), weight, saved))

    def _begin(self) -> None:
        with gathered(self.layers):
            self.pruner.begin(self.layers, self.budget, self._progress)
        self._begun = True
        self._mask()

    def _mask(self) -> None:
        with gathered(self.layers):
            masks = self._cubic() if self.cubic else self.pruner.masks(self.layers, self._progress)
        if masks:
            mask_model(self.model, agreed(masks, self.layers))

    def _cubic(self) -> dict[str, BlockMask] | None:
        """The masks of this step where an update is due."""
        done, phase = self.step - self._first, self.last - self._first
        if done % (self.every or max(1, round(phase / UPDATES))):
            return None
        now = ramped(self.budget, self._progress)
        return now.masks(self._scores(), self.layers) if now.sparsity else None

    @torch.no_grad()
    def _scores(self) -> dict[str, Tensor]:
        return {layer.name: self.pruner.score(layer) for layer in self.layers}

    @property
    def _first(self) -> int:
        """The step before which pruning begins; 0 is the first one."""
        return min(round(self.start * self.steps), self.last - 1)

    @property
    def last(self) -> int:
        """The step after which the masks are fixed."""
        return max(1, round(self.until * self.steps))

    @property
    def _progress(self) -> float:
        return min((self.step - self._first) / (self.last - self._first), 1.0)


def _hidden(layer: PrunableLayer, mask: BlockMask) -> Tensor:
    """The weight `(N, K)` with zeros where the mask keeps it, on the CPU."""
    return layer.weight.masked_fill(mask.elements().to(layer.weight.device), 0).cpu().contiguous()
