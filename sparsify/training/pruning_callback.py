"""Drives a pruner from the Hugging Face Trainer's own loop, on one process or several (DDP, FSDP2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask
from sparsify.errors import CheckpointError, ConfigError
from sparsify.masking import load_masks, save_masks
from sparsify.pruner import PrunableLayer, Pruner
from sparsify.training.pruning_loop import PruningLoop
from sparsify.training.sparsify_loop import (
    Calibration,
    Source,
    finish,
    make_loop,
    search_settings,
    unwrapped,
)

MASKS_FILE = "sparsify_masks.safetensors"
PRUNING_FILE = "sparsify_pruning.safetensors"


class PruningCallback(TrainerCallback):
    """Runs a pruner during training, then fixes the exact masks and lets training go on under them.

    What happens when is told by `sparsify.training.pruning_loop.PruningLoop`. Each checkpoint of the Trainer gets what
    a resumed run needs: the masks in force, the statistics that the pruner gathered, and the weights that its masks
    hide.

    Args:
        pruner: The algorithm.
        layers: The layers to prune, of the very model that the Trainer trains.
        budget: The sparsity to arrive at.
        until: Share of the training steps after which the masks are fixed, above 0 and at most 1.
        start: Share of the training steps before pruning begins, at least 0 and below `until`.
        schedule: `auto`, `cubic` or `once`.
        every: Optimizer steps between two updates of a cubic schedule.

    Raises:
        ConfigError: If a share is out of range.
        PrunerError: If the schedule is not for this pruner.
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
        self._loop: PruningLoop | None = PruningLoop(pruner, layers, budget, until, start, schedule, every)
        self._saved = 0

    @property
    def loop(self) -> PruningLoop:
        """The loop that drives the pruner.

        Raises:
            ConfigError: If training has not begun.
        """
        if self._loop is None:
            raise ConfigError("training has not begun: give the callback to a Trainer and call its train()")
        return self._loop

    @property
    def layers(self) -> list[PrunableLayer]:
        """The layers that are pruned."""
        return self.loop.layers

    @property
    def masks(self) -> dict[str, BlockMask] | None:
        """The fixed masks by layer name; `None` before the end of the pruning phase."""
        return self.loop.masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts, or goes on where a checkpoint left off."""
        stored = _read(_checkpoint(args, state)) if state.global_step else None
        self._saved = state.global_step
        self.loop.begin(unwrapped(kwargs["model"]), state.max_steps, stored)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the pruner the whole gradient, then hides that of pruned blocks from the optimizer."""
        self.loop.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the pruner act on the new weights; fixes the masks at the end of the phase."""
        self.loop.after_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds masks and statistics to the Trainer's checkpoint, unless `save` has been called for it."""
        self.save(_checkpoint(args, state), state)

    def save(self, folder: Path, state: TrainerState) -> None:
        """Writes what a resumed run needs; all processes call it. A second call in one step does nothing."""
        if self._saved == state.global_step:
            return
        self._saved = state.global_step
        stored = self.loop.stored()  # all processes, before all but one leave
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, stored)


class SparsifyCallback(PruningCallback):
    """Pruning in anybody's `transformers.Trainer`.

        pruning = sparsify.SparsifyCallback(method="movement", block="64x64", sparsity=0.7, until=0.6)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[pruning])
        trainer.train()
        pruning.finish()
        sparsify.save(model, "path/to/sparse")

    Layers are selected when training begins. The Trainer's checkpoints are ordinary ones, with zeros in pruned blocks,
    and `trainer.train(resume_from_checkpoint=...)` goes on as if nothing had happened.

    Args:
        recipe: A recipe that prunes in one stage: its path, its name, or a `Recipe`. Only that stage's pruning is read.
        calibration: Batches of the model's keyword arguments, for pruners and scopes that need statistics of inputs.
        **settings: Keys of a finetune stage's `pruner`, which win over the recipe's: `method`, `block`, `sparsity`,
            `start`, `until`, `schedule`, ...

    Raises:
        ConfigError: If the recipe or a setting is invalid.
    """

    def __init__(self, recipe: Source = None, *, calibration: Calibration = None, **settings: Any) -> None:
        self.search = search_settings(recipe, settings)
        self._calibration = calibration
        self._loop, self._saved = None, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Selects the layers, then starts, or goes on where a checkpoint left off.

        Raises:
            ConfigError: If the Trainer would bring back the weights of an earlier checkpoint in the end.
        """
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would bring back weights of a step with other masks, perhaps of the dense "
                "model: leave it off while pruning, and choose the best checkpoint of a training after finish()"
            )
        fresh = state.global_step == 0
        model: nn.Module = unwrapped(kwargs["model"])
        self._loop = PruningLoop(**make_loop(model, self.search, self._calibration, fresh))
        super().on_train_begin(args, state, control, **kwargs)

    def finish(self, *, convert: bool = True) -> dict[str, BlockMask]:
        """Ends pruning after training: the masks become part of the model.

        Args:
            convert: Swap the pruned layers for block-sparse ones, which store and compute only what is kept; `False`
                leaves dense layers with zeros.

        Returns:
            The masks by layer name.

        Raises:
            ConfigError: If the pruning phase is not over, or the model is sharded.
        """
        return finish(self.loop, convert)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_masks(folder / MASKS_FILE, state["masks"])
    tensors: dict[str, Tensor] = {f"hidden:{name}": weight for name, weight in state["hidden"].items()}
    for name, statistics in state["statistics"].items():
        tensors.update({f"statistics:{name}:{key}": t.contiguous() for key, t in statistics.items()})
    save_file(
        tensors, folder / PRUNING_FILE, {"step": str(state["step"]), "fixed": json.dumps(state["fixed"])}
    )


def _read(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    file = folder / PRUNING_FILE
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 -- not a dict
        state = {
            "step": int(about["step"]),
            "fixed": json.loads(about["fixed"]),
            "hidden": {},
            "statistics": {},
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed: {file.name} is missing or damaged ({error}); take an earlier checkpoint"
        ) from error
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        if kind == "hidden":
            state["hidden"][name] = tensor
        else:
            layer, _, statistic = name.rpartition(":")
            state["statistics"].setdefault(layer, {})[statistic] = tensor
    return {**state, "masks": load_masks(folder / MASKS_FILE)}
