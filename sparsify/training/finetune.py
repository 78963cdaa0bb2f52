"""Training a model with the Hugging Face Trainer as a `finetune` stage describes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsify.checkpoint.conversions import own_names
from sparsify.errors import ConfigError, SparsifyError
from sparsify.recipe.schema import FinetuneStage
from sparsify.runtime import processes
from sparsify.runtime.progress import Advance, Progress
from sparsify.training.dropout import dropout_of
from sparsify.training.masked_tokens import TokenHider
from sparsify.training.pruning_callback import PruningCallback
from sparsify.training.samples import UNITS, Samples, in_dtype
from sparsify.training.saving import written_whole
from sparsify.training.sharding import is_sharded

# Without `save_steps` and `logging_steps`: shares of the run between two checkpoints, and between two losses.
SAVE_EVERY, LOG_EVERY = 0.1, 0.02


def train(
    model: nn.Module,
    samples: Samples,
    stage: FinetuneStage,
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    callbacks: Sequence[TrainerCallback] = (),
    resume: Path | None = None,
    sparsity: Callable[[], float] | None = None,
    progress: Progress | None = None,
    logs: Path | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place.

    Weights of a lower precision are held in float32 while they are trained: an optimizer step is often smaller than
    the gap between two bfloat16 numbers. They get their own dtype back in the end.

    Args:
        model: A transformers model; its parameters change.
        samples: Data and loss.
        stage: Length, learning rate and everything else.
        folder: The Trainer's folder for its checkpoints.
        seed: Seed of data order and dropout.
        device: Where to train; of several GPUs the first visible one.
        callbacks: Further callbacks, such as the one that drives a pruner.
        resume: Checkpoint of an interrupted run, in `folder`.
        sparsity: Tells the share of removed weights, 0 to 1, for the history and whatever the Trainer reports to.
        progress: Told about every step.
        logs: Where TensorBoard's files go, if the stage asks for them; in `folder` when left out.

    Returns:
        Loss history: `step`, `loss` (mean since the last entry), `learning_rate`, `epoch`; `sparsity` if it is told.

    Raises:
        ConfigError: If the device, the precision or an argument of the Trainer is refused.
        SparsifyError: If the loss is no longer a finite number.
    """
    device = torch.device(device)
    arguments = _arguments(stage, folder, seed, device)
    progress = progress or Progress()
    was_training = model.training
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.train()
    try:
        with (
            _float32_weights(model),
            own_names(model),
            dropout_of(model, stage.dropout),
            progress.task("training") as advance,
        ):
            follow = _Follow(advance, stage.pruner.sparsity if stage.pruner else None, samples.collate)
            trainer = _Trainer(samples, sparsity, model=model, args=arguments, callbacks=[*callbacks, follow])
            trainer.remove_callback(PrinterCallback)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None and logs:
                    callback.logging_dir = str(logs)
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        model.train(was_training)
        if use_cache is not None:
            config.use_cache = use_cache  # the Trainer turns it off, and it would be saved that way
    kept = ("step", "loss", "learning_rate", "epoch", "sparsity")
    return [
        {key: entry[key] for key in kept if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def precision_of(stage: FinetuneStage, device: torch.device) -> str:
    """What the training multiplies in: `float32`, `bfloat16` or `float16`."""
    if stage.precision != "auto":
        return stage.precision
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if bf16 else "float32"


def _arguments(stage: FinetuneStage, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    if device.type == "cuda" and device.index not in (None, 0) and not processes.several():
        raise ConfigError(
            f"training uses the first visible GPU, got {device}: choose it with CUDA_VISIBLE_DEVICES"
        )
    precision = precision_of(stage, device)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": stage.batch,
        "gradient_accumulation_steps": stage.accumulate,
        "max_steps": stage.steps or -1,
        "num_train_epochs": stage.epochs or 1.0,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup,
        "weight_decay": stage.weight_decay,
        "lr_scheduler_type": stage.schedule,
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "save_strategy": "steps",
        "save_steps": stage.save_steps or SAVE_EVERY,
        "save_total_limit": 1,
        "logging_steps": LOG_EVERY,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
    }
    if stage.gradient_checkpointing:
        known = {field.name for field in fields(TrainingArguments)}
        new_name = "activation_checkpointing"  # newer versions warn about the old one
        settings[new_name if new_name in known else "gradient_checkpointing"] = True
    try:
        arguments = TrainingArguments(**{**settings, **stage.trainer})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"the Trainer refuses the finetune stage's settings: {error}") from error
    _ = arguments.device
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # several GPUs in one process would mean nn.DataParallel, which copies the model each step
        )
    return arguments


class _Trainer(Trainer):
    """A Trainer over `Samples`."""

    def __init__(self, samples: Samples, sparsity: Callable[[], float] | None, **options: Any) -> None:
        super().__init__(train_dataset=samples.dataset, data_collator=samples.collate, **options)
        self._samples, self._loss, self._sparsity = samples, samples.loss, sparsity
        self._done, self._since = 0, time.perf_counter()
        if self._loss is not None:
            # The loss is a mean over one micro-batch; the Trainer divides it by their number only if told so.
            self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._done += self._samples.size(inputs)
        inputs = in_dtype(inputs, model)  # weights that are not trained are not held in float32
        if self._loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self._loss(model, inputs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The Trainer writes its own state last, and then drops the checkpoint before: a run that is killed in between
        # finds one of the two whole. So masks come first, not in `on_save`.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with written_whole(folder):
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, PruningCallback):
                    callback.save(folder, self.state)
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            done = self._done * self.args.world_size  # each process counts its own share
            logs[f"{self._samples.unit}_per_second"] = done / (now - self._since)
            self._done, self._since = 0, now
            if self._sparsity is not None:
                logs["sparsity"] = self._sparsity()
        super().log(logs, *args, **kwargs)


class _Follow(TrainerCallback):
    """Drives the progress bar, stops a run whose loss is no number, and leaves the last step's saving to the stage."""

    def __init__(self, advance: Advance, target: float | None, collate: Any) -> None:
        self._advance, self._target, self._collate = advance, target, collate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step, total=state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self._collate, TokenHider):
            self._collate.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
        if state.global_step >= state.max_steps:
            control.should_save = False
        # A resumed run counts its losses from the checkpoint on: so does an unbroken one, and both log the same curve.
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise SparsifyError(
                f"training diverged: the loss is {loss} at step {state.global_step}; lower learning_rate "
                f"or raise warmup"
            )
        self._advance(0, text=", ".join(self._parts(logs or {})))

    def _parts(self, logs: dict[str, float]) -> Iterator[str]:
        yield f"loss {logs['loss']:.3f}"
        yield f"rate {logs['learning_rate']:.1e}"
        if "sparsity" in logs:
            yield f"{logs['sparsity']:.0%} removed" + (f" of {self._target:.0%}" if self._target else "")
        for unit in UNITS & {key.removesuffix("_per_second") for key in logs}:
            yield f"{logs[f'{unit}_per_second']:,.0f} {unit}/s"


@contextmanager
def _float32_weights(model: nn.Module) -> Iterator[None]:
    """Holds floating parameters that are trained in float32; afterwards each has its own dtype back."""
    dtypes = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.requires_grad
    }
    parameters = dict(model.named_parameters())
    for name in dtypes:
        parameters[name].data = parameters[name].data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if not is_sharded(parameter):  # else whoever puts the shards together does it
                parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
