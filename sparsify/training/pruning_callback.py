"""Drives a pruner from the Hugging Face Trainer's own loop, on one process or several (DDP, FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsify.allocation import Budget
from sparsify.blocks import BlockMask
from sparsify.errors import ConfigError
from sparsify.masking import current_masks, load_masks, mask_gradients, mask_model, save_masks
from sparsify.pruner import PrunableLayer, Pruner
from sparsify.training.sharding import gathered, rebind

MASKS_FILE = "sparsify_masks.safetensors"
STATISTICS_FILE = "sparsify_statistics.safetensors"
HIDDEN_FILE = "sparsify_hidden.safetensors"


class PruningCallback(TrainerCallback):
    """Runs a pruner during training, then fixes the exact masks and lets training go on under them.

    Three phases. Warm-up: up to the share `start` of the steps the dense network trains by itself. Pruning: the
    pruner's `before_step` and `after_step` are called around each optimizer step until the share `until` is done, and
    the layers are trained under the `masks` that it gives in between. Healing: its last scores have become masks,
    `update_weights` may have compensated, and the layers are masked for good (`sparsify.masking`). Each checkpoint of
    the Trainer gets what a resumed run needs: the masks once they are fixed, the statistics that the pruner gathered,
    and the weights that its masks hide.

    Under FSDP2 the pruner sees whole weights (`sparsify.training.sharding`): while it works, each process holds all
    pruned weights and their gradients.

    Attributes:
        masks: The fixed masks by layer name; `None` before the end of the pruning phase.
    """

    def __init__(
        self,
        pruner: Pruner,
        layers: Sequence[PrunableLayer],
        budget: Budget,
        until: float = 1.0,
        start: float = 0.0,
    ) -> None:
        """
        Args:
            pruner: The algorithm.
            layers: The layers to prune, of the very model that the Trainer trains.
            budget: The sparsity to arrive at.
            until: Share of the training steps after which the masks are fixed, above 0 and at most 1.
            start: Share of the training steps before pruning begins, at least 0 and below `until`.

        Raises:
            ConfigError: If a share is out of range.
        """
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
        self.masks: dict[str, BlockMask] | None = None
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the pruning phase, or takes it up where a checkpoint left it."""
        rebind(self.layers, kwargs["model"])
        if state.global_step:
            self._restore(_checkpoint(args, state), kwargs["model"])
        if self.masks is None and state.global_step >= self._first(state):
            self._begin(kwargs["model"], state)
            if state.global_step:
                self._restore_hidden(_checkpoint(args, state), kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the pruning phase where the warm-up ends."""
        if state.global_step and state.global_step == self._first(state) and not self._begun:
            self._begin(kwargs["model"], state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the pruner the whole gradient, then hides that of pruned blocks from the optimizer."""
        if self._begun and self.masks is None:
            with gathered(self.layers):
                self.pruner.before_step(self.layers, self._progress(state.global_step, state))
        mask_gradients(kwargs["model"])

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the pruner act on the new weights; fixes the masks at the end of the phase."""
        if self.masks is not None or not self._begun:
            return
        progress = self._progress(state.global_step + 1, state)
        with gathered(self.layers, write=True):
            self.pruner.after_step(self.layers, progress)
            if progress >= 1.0:
                self.masks = self.budget.masks(
                    {layer.name: self.pruner.score(layer) for layer in self.layers}, self.layers
                )
                for layer in self.layers:
                    self.pruner.update_weights(layer, self.masks[layer.name])
        if self.masks is not None:
            # Nobody looks at the gradient of pruned blocks any more, and clipping shall not count it.
            mask_model(kwargs["model"], self.masks, dense_gradient=False)
        else:
            self._mask(kwargs["model"], progress)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds masks and statistics to the Trainer's checkpoint."""
        folder = _checkpoint(args, state)
        masks = current_masks(kwargs["model"]) if self.masks is None else {}
        with gathered(self.layers if masks else []):  # all processes, before all but one leave
            hidden = {
                layer.name: _hidden(layer, masks[layer.name]) for layer in self.layers if layer.name in masks
            }
        if not state.is_world_process_zero or not folder.is_dir():
            return
        if self.masks is not None:
            save_masks(folder / MASKS_FILE, self.masks)
        statistics = {
            f"{layer.name}:{key}": t for layer in self.layers for key, t in layer.statistics.items()
        }
        if statistics:
            from safetensors.torch import save_file

            save_file({key: t.contiguous() for key, t in statistics.items()}, folder / STATISTICS_FILE)
        if hidden:
            from safetensors.torch import save_file

            save_file(hidden, folder / HIDDEN_FILE)

    def _begin(self, model: nn.Module, state: TrainerState) -> None:
        progress = self._progress(state.global_step, state)
        with gathered(self.layers):
            self.pruner.begin(self.layers, self.budget, progress)
        self._begun = True
        self._mask(model, progress)

    def _mask(self, model: nn.Module, progress: float) -> None:
        with gathered(self.layers):
            masks = self.pruner.masks(self.layers, progress)
        if masks:
            mask_model(model, masks)

    @torch.no_grad()
    def _restore_hidden(self, folder: Path, model: nn.Module) -> None:
        """Puts back what the checkpoint's ordinary files hold zeros for."""
        if (folder / HIDDEN_FILE).is_file():
            from safetensors.torch import load_file

            saved, masks = load_file(folder / HIDDEN_FILE), current_masks(model)
            with gathered(self.layers, write=True):
                for layer in self.layers:
                    if layer.name in saved:
                        weight, keep = layer.weight, masks[layer.name].elements()
                        weight.copy_(
                            torch.where(keep.to(weight.device), weight, saved[layer.name].to(weight.device))
                        )

    def _first(self, state: TrainerState) -> int:
        """The step before which pruning begins; 0 is the first one."""
        return min(round(self.start * state.max_steps), self._last(state) - 1)

    def _last(self, state: TrainerState) -> int:
        """The step after which the masks are fixed."""
        return max(1, round(self.until * state.max_steps))

    def _progress(self, step: int, state: TrainerState) -> float:
        first = self._first(state)
        return min((step - first) / (self._last(state) - first), 1.0)

    def _restore(self, folder: Path, model: nn.Module) -> None:
        if (folder / STATISTICS_FILE).is_file():
            from safetensors.torch import load_file

            saved = load_file(folder / STATISTICS_FILE)
            for layer in self.layers:
                layer.statistics.update(_of(layer, saved))
        if (folder / MASKS_FILE).is_file():
            self.masks = load_masks(folder / MASKS_FILE)
            mask_model(model, self.masks, dense_gradient=False)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _hidden(layer: PrunableLayer, mask: BlockMask) -> Tensor:
    """The weight `(N, K)` with zeros where the mask keeps it."""
    return layer.weight.masked_fill(mask.elements().to(layer.weight.device), 0).contiguous()


def _of(layer: PrunableLayer, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {key.rpartition(":")[2]: t for key, t in saved.items() if key.rpartition(":")[0] == layer.name}
    device = layer.parameter.device
    return {key: tensor.to(device) if tensor.dim() else tensor for key, tensor in own.items()}
