"""Training: searching the mask with a pruner, or healing what pruning broke."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import masking
from sparsify.errors import ConfigError
from sparsify.layers.swap import sparse_modules
from sparsify.preparation import budget, prepare
from sparsify.recipe.schema import ConvertStage, FinetuneStage
from sparsify.recipe.training import Distill
from sparsify.runtime import processes
from sparsify.stages.convert import choose, pack
from sparsify.stages.heal_choice import faster_form
from sparsify.stages.prune import order_units
from sparsify.stages.report import totals
from sparsify.stages.state import State
from sparsify.training.finetune import precision_of, train
from sparsify.training.pruning_callback import PruningCallback
from sparsify.training.samples import Samples, load_samples
from sparsify.training.sharding import fill, freeze_empty, gathered, spare


def run(stage: FinetuneStage, state: State) -> None:
    """Trains the model as the stage says; the state is stored before the first step."""
    if stage.skipped:
        return
    spec = state.recipe.data.train
    assert spec is not None
    with state.progress.task("reading training data"):
        labelled = stage.distill is None or stage.distill.task > 0
        samples = load_samples(
            spec, state.processor, state.model, state.task, state.recipe.seed, labelled=labelled
        )
    if stage.distill is not None:
        samples = _distilled(stage.distill, stage.batch, state, samples)
    if stage.pruner is not None:
        _search(stage, state, samples)
    else:
        _heal(stage, state, samples, spec.length)
    state.changed = True


def _distilled(settings: Distill, batch: int, state: State, samples: Samples) -> Samples:
    """The samples with a loss that learns from the teacher, which is loaded, or its stored outputs opened."""
    from sparsify.training import teacher, teacher_cache
    from sparsify.training.distillation import Weights, distilled

    recipe, task = state.recipe, state.task
    assert recipe.model is not None and task is not None
    source = str(state.teacher or recipe.model)
    weights = Weights.of(settings, task)

    def load() -> nn.Module:
        with state.progress.task("loading the teacher"):
            trust = recipe.trust_remote_code
            return teacher.load_teacher(settings, source, task, state.processor, state.device, trust)

    if settings.teacher_memory == "cache":
        samples = teacher_cache.numbered(samples)
        folder = state.trainer_folder / "teacher"
        told = teacher_cache.cached(folder, samples, weights, load, batch, state.progress)
        return distilled(samples, told, weights, task)
    live = teacher.LiveTeacher(load(), offload=settings.teacher_memory == "offload")
    return distilled(samples, live, weights, task)


def _search(stage: FinetuneStage, state: State, samples: Samples) -> None:
    """Trains dense weights while the pruner shrinks blocks; the exact masks are fixed at the end of its phase."""
    settings = stage.pruner
    assert settings is not None
    pruner, selection = prepare(state.model, settings, state.statistics)
    order_units(settings, state, selection.layers, state.index)
    state.keep()
    searched = {layer.name for layer in selection.layers}
    fixed = {name: mask for name, mask in state.dense_masks.items() if name not in searched}
    whole = spare(state.model) if processes.is_sharding() else None
    masking.mask_model(state.model, fixed, dense_gradient=False)
    callback = PruningCallback(
        pruner,
        selection.layers,
        budget(settings),
        settings.until,
        settings.start,
        settings.schedule,
        settings.every,
    )

    def sparsity() -> float:
        with gathered(selection.layers):
            return masking.removed_share(state.model, selection.layers)

    _train(stage, state, samples, sparsity, callback)
    masks = masking.unmask(state.model)
    _gather(state, whole)
    state.prune(masks, selection.dense)
    state.trained = settings.until < 1


def _heal(stage: FinetuneStage, state: State, samples: Samples, length: int) -> None:
    """Trains kept blocks alone: packed, or in dense weights under the mask."""
    form = processes.decided(lambda: _form(stage, state, stage.batch * length))
    if form == "packed":
        choose(state, _dense_where_slower(state))
        pack(state)
    state.keep()
    whole = spare(state.model) if processes.is_sharding() else None
    if whole is not None:
        freeze_empty(state.model)
    # All that is masked, or what stays dense beside packed layers.
    masking.mask_model(state.model, state.dense_masks, dense_gradient=False)
    kept = totals(state.masks)["sparsity"]
    with _adapted(stage, state.model) as model:
        _train(stage, state, samples, (lambda: kept) if state.masks else None, model=model)
    masking.unmask(state.model)
    _gather(state, whole)
    state.trained = bool(state.masks)


@contextmanager
def _adapted(stage: FinetuneStage, model: Any) -> Iterator[Any]:
    """What is trained: the model, or low-rank updates of its packed blocks, which are merged at the end."""
    if stage.lora is None:
        yield model
        return
    from sparsify.training.lora import adapted

    with adapted(model, stage.lora) as wrapped:
        yield wrapped


def _gather(state: State, whole: Any) -> None:
    """Puts the whole model, with the weights that its shards have now, in the place of the sharded one."""
    if whole is not None:
        fill(whole, state.model, state.device)
        state.model = whole


def _dense_where_slower(state: State) -> str:
    """What the conversion to come says of layers that would be slower; without one the default decides."""
    later = state.recipe.stages[state.index :]
    return next((stage.dense_where_slower for stage in later if isinstance(stage, ConvertStage)), "auto")


def _form(stage: FinetuneStage, state: State, tokens: int) -> str:
    """`packed`, `masked`, or `dense` where there is no mask."""
    if processes.is_sharding() and stage.lora is not None:
        raise ConfigError(
            "low-rank updates cannot be sharded: leave `lora` out to train the packed blocks themselves in shards, or "
            "launch with DDP (sparsify recipe show accelerate/ddp)"
        )
    if sparse_modules(state.model):  # of a block-sparse source, perhaps with more masks since
        return "packed"
    if not state.masks:
        if stage.lora is not None:
            raise ConfigError(
                "lora trains packed blocks, and this model has none: prune it in a stage before"
            )
        return "dense"
    if stage.lora is not None:
        return "packed"
    if stage.heal != "auto":
        return stage.heal
    key = f"heal.{state.index}"
    if key not in state.choices:
        later = state.recipe.stages[state.index :]
        if any(other.stage == "convert" and other.format == "dense" for other in later):
            state.choices[key], reason = "masked", "the result is to be dense"
        else:
            with state.progress.task("timing both ways to heal"):
                state.choices[key], reason = faster_form(
                    state.model, state.masks, tokens, getattr(torch, precision_of(stage, state.device))
                )
        state.note(f"heal: auto trains {state.choices[key]} weights: {reason}")
    return state.choices[key]


def _train(
    stage: FinetuneStage,
    state: State,
    samples: Samples,
    sparsity: Callable[[], float] | None,
    *callbacks: PruningCallback,
    model: Any = None,
) -> None:
    assert state.recipe.out is not None
    out = Path(state.recipe.out).expanduser().resolve()
    points = train(
        state.model if model is None else model,
        samples,
        stage,
        state.trainer_folder,
        seed=state.recipe.seed + state.index,
        device=state.device,
        callbacks=callbacks,
        resume=state.resume,
        sparsity=sparsity,
        progress=state.progress,
        # Beside the output, since the Trainer's own folder goes when the run has succeeded.
        logs=out.with_name(f"{out.name}.logs") / str(state.index),
    )
    state.history.append({"stage": state.index, "points": points})
