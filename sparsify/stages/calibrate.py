"""Calibration: samples for the next pruner, or the statistics of layer inputs that it asks for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sparsify.calibration.statistics import collect_statistics, needs_calibration
from sparsify.preparation import make_pruner, selected
from sparsify.pruner import name_of
from sparsify.recipe.schema import ENOUGH, CalibrateStage, FinetuneStage, PruneStage, Pruning, Recipe
from sparsify.stages.prune import order_units
from sparsify.stages.state import State
from sparsify.training.samples import Samples, in_dtype, load_samples

SAMPLES = 128  # of what has no tokens, where the stage does not say how many


def run(stage: CalibrateStage, state: State) -> None:
    """Reads calibration samples; if the next pruner works during training, keeps what it wants to know of them."""
    index, settings = next_pruning(state.recipe, state.index)
    pruner = make_pruner(settings)
    reconstructs = isinstance(settings, PruneStage) and settings.reconstruct > 0
    if not needs_calibration(pruner) and not reconstructs:
        state.note(f"calibrate: pruner {name_of(settings.method)!r} asks for no statistics, nothing to do")
        return
    spec = state.recipe.data.calibration
    assert spec is not None
    with state.progress.task("reading calibration data"):
        samples = load_samples(
            spec, state.processor, state.model, state.task, state.recipe.seed, labelled=False
        )
        batches = _batches(stage, samples, state)
    if isinstance(settings, PruneStage):  # it walks through the model itself, one transformer block at a time
        state.calibration = batches
        if "hessian" in pruner.requires:
            _compare_with_widths(settings, state)
        return
    layers = selected(state.model, settings).layers
    order_units(
        settings, state, layers, index
    )  # now: statistics are of inputs in the order that will be pruned
    with state.progress.task("calibrating", len(batches)) as advance:

        def shown() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                yield batch
                advance()

        collect_statistics(state.model, layers, pruner, shown(), state.device)
    state.statistics = {layer.name: layer.statistics for layer in layers}


def _batches(stage: CalibrateStage, samples: Samples, state: State) -> list[dict[str, Tensor]]:
    """Inputs of as many samples as the stage asks for, or as hold enough tokens."""
    present = len(samples.dataset)
    most = min(stage.samples or present, present)
    batches: list[dict[str, Tensor]] = []
    tokens = 0
    for start in range(0, most, stage.batch):
        rows = range(start, min(start + stage.batch, most))
        batches.append(batch_of(samples, rows, state.model))
        counted = _tokens(batches[-1])
        tokens += ENOUGH // SAMPLES * len(rows) if counted is None else counted
        if stage.samples is None and tokens >= ENOUGH:
            break
    if most < (stage.samples or 0):
        state.note(f"calibrate: the data hold {most} samples, fewer than the {stage.samples} asked for")
    return batches


def _tokens(batch: dict[str, Tensor]) -> int | None:
    """How many tokens a batch holds, padding left out; `None` if it has no tokens."""
    if "input_ids" not in batch:
        return None
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _compare_with_widths(settings: Pruning, state: State) -> None:
    """Says so where there are fewer tokens than a layer has inputs, and second moments of these are singular."""
    counts = [_tokens(batch) for batch in state.calibration or ()]
    if None in counts:
        return
    tokens = sum(count or 0 for count in counts)
    layers = selected(state.model, settings).layers
    widest = max(layers, key=lambda layer: layer.shape[1])
    if tokens < widest.shape[1]:
        state.note(
            f"calibrate: {tokens} tokens are fewer than the {widest.shape[1]} inputs of layer {widest.name}: its "
            f"Hessian is singular, and only the damping makes it usable; give more data"
        )


def next_pruning(recipe: Recipe, index: int) -> tuple[int, Pruning]:
    """Stage and settings of the first pruning after stage `index`; the schema has made sure that there is one."""
    for later, stage in enumerate(recipe.stages[index + 1 :], index + 1):
        if isinstance(stage, PruneStage):
            return later, stage
        if isinstance(stage, FinetuneStage) and stage.pruner is not None:
            return later, stage.pruner
    raise AssertionError("a calibrate stage without a pruning after it passed validation")


def batch_of(samples: Samples, rows: range, model: nn.Module) -> dict[str, Tensor]:
    """Inputs of a forward pass, without labels."""
    batch = in_dtype(samples.collate([samples.dataset[row] for row in rows]), model)
    return {key: value for key, value in batch.items() if key != "labels"}
