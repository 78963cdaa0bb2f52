"""Drives a pruner from the Hugging Face Trainer's own loop."""

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

MASKS_FILE = "sparsify_masks.safetensors"
STATISTICS_FILE = "sparsify_statistics.safetensors"
HIDDEN_FILE = "sparsify_hidden.safetensors"


class PruningCallback(TrainerCallback):
    """Runs a pruner during training, then fixes the exact masks and lets training go on under them.

    The pruner's `before_step` and `after_step` are called around each optimizer step until the share `until` of the
    steps is done, and the layers are trained under the `masks` that it gives in between. Then its last scores become
    masks, `update_weights` may compensate, and the layers are masked for good (`sparsify.masking`). Each checkpoint of
    the Trainer gets what a resumed run needs: the masks once they are fixed, the statistics that the pruner gathered,
    and the weights that its masks hide.

    Attributes:
        masks: The fixed masks by layer name; `None` before the end of the pruning phase.
    """

    def __init__(
        self, pruner: Pruner, layers: Sequence[PrunableLayer], budget: Budget, until: float = 1.0
    ) -> None:
        """
        Args:
            pruner: The algorithm.
            layers: The layers to prune, of the very model that the Trainer trains.
            budget: The sparsity to arrive at.
            until: Share of the training steps that pruning takes, above 0 and at most 1.

        Raises:
            ConfigError: If `until` is out of range.
        """
        if not 0.0 < until <= 1.0:
            raise ConfigError(
                f"until {until} is out of range: it is a share of the steps, above 0 and at most 1"
            )
        self.pruner, self.layers, self.budget, self.until = pruner, list(layers), budget, until
        self.masks: dict[str, BlockMask] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the pruning phase, or takes it up where a checkpoint left it."""
        if state.global_step:
            self._restore(_checkpoint(args, state), kwargs["model"])
        if self.masks is None:
            progress = self._progress(state.global_step, state)
            self.pruner.begin(self.layers, self.budget, progress)
            self._mask(kwargs["model"], progress)
            if state.global_step:
                self._restore_hidden(_checkpoint(args, state), kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the pruner the whole gradient, then hides that of pruned blocks from the optimizer."""
        if self.masks is None:
            self.pruner.before_step(self.layers, self._progress(state.global_step, state))
        mask_gradients(kwargs["model"])

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the pruner act on the new weights; fixes the masks at the end of the phase."""
        if self.masks is not None:
            return
        progress = self._progress(state.global_step + 1, state)
        self.pruner.after_step(self.layers, progress)
        if progress >= 1.0:
            self.masks = self.budget.masks(
                {layer.name: self.pruner.score(layer) for layer in self.layers}, self.layers
            )
            for layer in self.layers:
                self.pruner.update_weights(layer, self.masks[layer.name])
            # Nobody looks at the gradient of pruned blocks any more, and clipping shall not count it.
            mask_model(kwargs["model"], self.masks, dense_gradient=False)
        else:
            self._mask(kwargs["model"], progress)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds masks and statistics to the Trainer's checkpoint."""
        folder = _checkpoint(args, state)
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
        masks = current_masks(kwargs["model"]) if self.masks is None else {}
        hidden = {
            layer.name: _hidden(layer, masks[layer.name]) for layer in self.layers if layer.name in masks
        }
        if hidden:
            from safetensors.torch import save_file

            save_file(hidden, folder / HIDDEN_FILE)

    def _mask(self, model: nn.Module, progress: float) -> None:
        if masks := self.pruner.masks(self.layers, progress):
            mask_model(model, masks)

    @torch.no_grad()
    def _restore_hidden(self, folder: Path, model: nn.Module) -> None:
        """Puts back what the checkpoint's ordinary files hold zeros for."""
        if (folder / HIDDEN_FILE).is_file():
            from safetensors.torch import load_file

            saved, masks = load_file(folder / HIDDEN_FILE), current_masks(model)
            for layer in self.layers:
                if layer.name in saved:
                    weight, keep = layer.weight, masks[layer.name].elements()
                    weight.copy_(
                        torch.where(keep.to(weight.device), weight, saved[layer.name].to(weight.device))
                    )

    def _progress(self, step: int, state: TrainerState) -> float:
        return min(step / max(1, round(self.until * state.max_steps)), 1.0)

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
