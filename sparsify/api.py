"""The Python interface: prune a model in memory, save and load it, or run a whole recipe.

Everything here is also exported by the package itself (`sparsify.prune`, `sparsify.save`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor, nn

from sparsify.allocation.scopes import Scope
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import ConfigError
from sparsify.recipe.faults import describe, from_pydantic
from sparsify.recipe.schema import PruneStage, Recipe

if TYPE_CHECKING:
    import torch

    from sparsify.data.spec import Source
    from sparsify.permutation import Permuted
    from sparsify.pipeline import RunResult
    from sparsify.pruner import Method, PrunableLayer
    from sparsify.runtime.progress import Progress
    from sparsify.targets import KeptDense


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did. Printing it gives a table of the layers.

    Attributes:
        masks: Mask of each pruned weight matrix by name, `keep` `(R, C)` bool on the CPU.
        kept_dense: Layers that stay dense, and why.
        permuted: With `permute`, what each group of units gained by its new order; else empty.
    """

    masks: dict[str, BlockMask]
    kept_dense: list[KeptDense]
    permuted: list[Permuted] = field(default_factory=list)

    @property
    def density(self) -> dict[str, float]:
        """Share of elements kept, 0 to 1, of each pruned weight matrix by name."""
        return {name: mask.density for name, mask in self.masks.items()}

    @property
    def sparsity(self) -> float:
        """Share of elements removed, 0 to 1, over all pruned weight matrices."""
        kept = sum(mask.elements_kept for mask in self.masks.values())
        return 1 - kept / sum(mask.shape[0] * mask.shape[1] for mask in self.masks.values())

    def __str__(self) -> str:
        width = max(len(name) for name in [*self.masks, *(kept.name for kept in self.kept_dense)])
        lines = [
            f"{name:{width}}  {mask.shape[0]:>6} x {mask.shape[1]:<6}  {mask.block!s:>7}  density {mask.density:.3f}"
            for name, mask in self.masks.items()
        ]
        lines += [f"{kept.name:{width}}  dense: {kept.reason}" for kept in self.kept_dense]
        return "\n".join([*lines, f"{len(self.masks)} weights, {self.sparsity:.1%} removed"])


def prune(
    model: nn.Module,
    *,
    method: Method | None = None,
    block: BlockShape | str | int | tuple[int, int] = "64x64",
    sparsity: float = 0.5,
    scope: Scope = "global",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    floor: float | None = None,
    ceiling: float = 1.0,
    sensitivity: str | Path | None = None,
    permute: bool = False,
    per_position: bool = False,
    convert: bool = True,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    reconstruct: int | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> PruneResult:
    """Prunes a model in blocks, in place.

    Args:
        model: A transformers model, or any module. Its weights change.
        method: A name that `sparsify pruners` lists, `package.module:Class`, or a class derived from
            `sparsify.Pruner`. Default: `block_obs` with reconstruction if there is calibration data, else `magnitude`.
        block: Block shape as `(out, in)` features, such as `"64x64"`; each side a power of two from 8 to 256.
        sparsity: Share of the selected weights' elements to remove, at least 0 and below 1; met within one block.
        scope: `global` (one budget), `layer` (each layer the same share), `row` (each block row the same share); or a
            density for each layer by its size (`erdos_renyi`), its outliers (`outlier`, needs `calibration`), what
            its loss costs (`sensitivity`), or what a function of your own says (see `sparsify.allocation.scopes`).
        targets: Layers to prune: exact module names, `re:` patterns or class names. Default: every linear layer,
            Conv1D and fused expert of the model's repeated blocks.
        ignore: Layers to leave dense, named in the same three ways.
        floor: Smallest density a single layer may get, 0 to 1, except under `layer` and `row`. Default: a share of the
            mean density, so that no layer is emptied.
        ceiling: Largest density a single layer may get, 0 to 1, except under `layer` and `row`.
        sensitivity: For that scope, the file that `sparsify sensitivity` wrote.
        permute: First put units that can change places in an order that concentrates strong weights into blocks (see
            `sparsify.permute`); the function stays as it is.
        per_position: Give each kernel position of a convolution a mask of its own, instead of one for all of them.
        convert: Swap the layers for block-sparse ones at once. If false, removed blocks are zeros in dense weights,
            and training should hold them there (`sparsify.masking.mask_model(model, result.masks)`).
        calibration: Batches of the model's keyword arguments, for pruners that ask for statistics of layer inputs.
        reconstruct: Steps in which each transformer block's kept weights are then trained, on `calibration`, to put
            out what the dense block did (see `sparsify.calibration.reconstruction`); a few hundred are enough.
            Default: 300 if no method is named, else 0.
        cache: Folder for the scores of such pruners: another sparsity, scope or bound with the same model, data and
            options starts from them, and an interrupted call goes on where it stopped.
        device: Where such pruners compute. Give the GPU for a model on the CPU that is larger than it: one
            transformer block at a time goes there. Default: where the model is.
        **options: Options of the pruner, such as `norm="l1"` of `magnitude`.

    Returns:
        Masks, densities, and what stayed dense and why.

    Raises:
        BlockShapeError: If the block shape is not supported.
        ConfigError: If another argument is wrong; all faults at once.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        PrunerError: If the pruner is unknown, or a weight or score is not finite. The model is unchanged then, but
            for the order of units.
    """
    from sparsify.calibration.cache import WalkCache
    from sparsify.calibration.sequential import prune_in_walks
    from sparsify.calibration.statistics import needs_calibration
    from sparsify.layers import swap
    from sparsify.permutation import permute as reorder
    from sparsify.preparation import budget, prepare
    from sparsify.pruner import create_pruner, default_method
    from sparsify.recipe import record
    from sparsify.stages.prune import prune_layers

    shape = BlockShape.parse(block)
    method, reconstruct = default_method(calibration is not None, method, reconstruct)
    create_pruner(method, **options)
    settings = _settings(
        method=method,
        options=options,
        block=shape,
        sparsity=sparsity,
        scope=scope,
        floor=floor,
        ceiling=ceiling,
        sensitivity=None if sensitivity is None else str(sensitivity),
        targets=targets,
        ignore=ignore,
        permute=permute,
        per_position=per_position,
        reconstruct=reconstruct,
    )
    if reconstruct and calibration is None:
        raise ConfigError("reconstruct needs calibration data: give `calibration`")
    limits = budget(settings)
    pruner, selection = prepare(model, settings, walks=calibration is not None)
    if convert and any(not layer.module_name for layer in selection.layers):
        raise ConfigError(
            f"the model is itself the layer to prune, a {type(model).__name__}, and nothing can take its place: put it "
            f"into a module first, as in nn.Sequential(model)"
        )
    permuted: list[Permuted] = []
    if permute:
        names = {layer.name for layer in selection.layers}
        permuted = reorder(model, shape, sparsity, weights=names)
    if calibration is not None and (reconstruct or needs_calibration(pruner)):
        store = None if cache is None else WalkCache(cache)
        masks = prune_in_walks(
            model,
            pruner,
            selection.layers,
            limits,
            calibration,
            reconstruct=reconstruct,
            device=device,
            cache=store,
        )
    else:
        masks = prune_layers(pruner, selection.layers, limits)
    if convert:
        swap.convert(model, masks)
        _attach(model)
    record.remember(model, settings, calibrated=calibration is not None)
    return PruneResult(masks, selection.dense, permuted)


def score(
    model: nn.Module,
    *,
    method: Method = "magnitude",
    block: BlockShape | str | int | tuple[int, int] = "64x64",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_position: bool = False,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> list[tuple[PrunableLayer, Tensor]]:
    """Scores the blocks of a dense model, for a loop of one's own that makes the masks; `apply` then prunes.

    Args:
        model: Any module; nothing of it changes.
        method: As in `prune`, and so are all arguments below.
        block: Block shape.
        targets: Layers to score.
        ignore: Layers to leave out.
        per_position: Whether kernel positions of a convolution are matrices of their own.
        calibration: Batches of the model's keyword arguments, for pruners that ask for statistics of layer inputs.
        device: Where such pruners compute.
        **options: Options of the pruner.

    Returns:
        For each layer (name, weight, shape, ...; see `sparsify.pruner.PrunableLayer`) its scores `(R, C)`, higher
        for blocks that matter more.

    Raises:
        SparsifyError: As `prune` does.
    """
    from sparsify.preparation import prepare
    from sparsify.scoring import score_layers

    shape = BlockShape.parse(block)
    settings = _settings(
        method=method, options=options, block=shape, targets=targets, ignore=ignore, per_position=per_position
    )
    pruner, selection = prepare(model, settings, walks=calibration is not None)
    scores = score_layers(model, pruner, selection.layers, calibration, device)
    return list(zip(selection.layers, scores, strict=True))


def apply(model: nn.Module, masks: Mapping[str, BlockMask], *, convert: bool = True) -> PruneResult:
    """Prunes a dense model with masks of one's own, in place.

    Args:
        model: The model that they were made for.
        masks: For each layer's name its mask; layers without one stay dense.
        convert: As in `prune`.

    Raises:
        ConfigError: If there is no mask, or one names no dense weight, does not fit it, or is for a weight that two
            modules share. The model is unchanged then.
    """
    import torch

    from sparsify.calibration.sequential import remove_blocks
    from sparsify.layers import swap
    from sparsify.layers.kinds import every_matrix
    from sparsify.targets import address, shared_weights

    if not masks:
        raise ConfigError("there are no masks to apply: give at least one, by its layer's name")
    found = {
        layer.name: layer for name, module in model.named_modules() for layer in every_matrix(name, module)
    }
    shared = shared_weights(model)
    for name, mask in masks.items():
        if name not in found:
            raise ConfigError(
                f"cannot apply the mask of {name!r}: the model has no dense weight of this name"
            )
        if mask.shape != found[name].shape:
            shapes = f"its weight is {found[name].shape}, the mask is for {mask.shape}"
            raise ConfigError(f"cannot apply the mask of {name}: {shapes}")
        owners = shared.get(address(found[name].parameter), ())
        if owners:
            other = next((owner for owner in owners if owner != found[name].module_name), owners[0])
            raise ConfigError(
                f"cannot apply the mask of {name}: it shares its weight with {other}, and a shared weight has to stay "
                f"dense; leave the mask out, or untie the two (tie_word_embeddings: false) first"
            )
    if convert:
        swap.convert(model, dict(masks))
        _attach(model)
    else:
        with torch.no_grad():
            for name, mask in masks.items():
                remove_blocks(found[name], mask)
    return PruneResult(dict(masks), [])


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    task: str | None = None,
    *,
    model: nn.Module | None = None,
) -> Any:
    """Loads a checkpoint, block-sparse or dense; the same as the right `AutoModel...from_pretrained`.

    Args:
        path: A folder, or a name on the Hub.
        device: Where to put the model; `"auto"` spreads it over devices. Default: the CPU.
        dtype: Dtype of the weights. Default: the checkpoint's.
        task: A recipe's task, such as `causal-lm`; by default the class that the checkpoint was saved from.
        model: For the checkpoint of a plain module, a dense one of its class: `MyModel(...)`. It is filled in place.

    Returns:
        The model in evaluation mode: a `PreTrainedModel`, or `model`.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, unsafe, or does not fit the task or `model`.
        ConfigError: If `model` is none that can be filled, or comes with a task.
    """
    from sparsify.checkpoint import plain, reader

    if model is not None:
        if task is not None:
            raise ConfigError(f"task {task!r} is for models of transformers: leave it out beside `model`")
        return plain.load(path, model, device, dtype)
    return reader.load(path, device, dtype, task)


def save(model: nn.Module, out: str | Path, *, processor: Any = None, force: bool = False) -> Path:
    """Writes a model, with block-sparse layers or without, as a checkpoint folder; all of it or nothing.

    Args:
        model: A transformers model, or any module; that one `load(out, model=MyModel(...))` reads again. How `prune`
            made it is written beside the weights, as a recipe.
        out: Folder to write; it must not exist, or be empty.
        processor: Tokenizer, image processor or feature extractor to save beside the weights.
        force: Replace an existing checkpoint in `out`; the old one stays until the new one is complete.

    Returns:
        The folder written.

    Raises:
        OutputError: If `out` exists, cannot be written, or does not fit on its disk.
        ConfigError: If `model` is none that can be written.
    """
    from sparsify.checkpoint import writer
    from sparsify.recipe import record

    return writer.save(model, out, processor=processor, recipe=record.recorded(model), force=force)


def densify(
    path: str | Path, out: str | Path, *, force: bool = False, model: nn.Module | None = None
) -> Path:
    """Writes the ordinary dense checkpoint that a block-sparse one stands for, for any runtime.

    Kept weights are bit-identical, removed ones are zero.

    Args:
        path: Block-sparse checkpoint: a folder, or a name on the Hub.
        out: Folder to write; it must not exist, or be empty.
        force: Replace an existing checkpoint in `out`.
        model: For the checkpoint of a plain module, a dense one of its class, which is filled in place.

    Returns:
        The folder written.

    Raises:
        CheckpointError: If `path` cannot be read or is dense already, or does not fit `model`.
        OutputError: If `out` exists, cannot be written, or does not fit on its disk.
    """
    from sparsify.checkpoint.densify import densify as write_dense

    return write_dense(path, out, force=force, module=model)


def run(
    recipe: Recipe | str | Path,
    *,
    model: str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Runs a recipe: its stages in order, then one checkpoint with recipe and report beside the weights.

    Args:
        recipe: A `Recipe`, the path of a YAML file, or the name of a packaged recipe.
        model: Checkpoint to compress, instead of the recipe's.
        out: Folder to write, instead of the recipe's.
        overrides: `key=value` settings, such as `prune.sparsity=0.6`.
        force: Replace an existing checkpoint in `out`, and start over if a run was interrupted.
        resume: Go on where an interrupted run of the same recipe stopped.
        progress: Told about the stages.

    Returns:
        The folder written, the report and the model. Printing it gives the table of measurements.

    Raises:
        SparsifyError: A child of it for whatever the user can put right; nothing is written then.
    """
    from sparsify import pipeline

    values = {"model": model, "out": str(out) if out is not None else None}
    if isinstance(recipe, Recipe):
        ready = Recipe.from_dict(recipe.model_dump(mode="json", exclude_none=True), overrides, values)
    else:
        ready = Recipe.load(recipe, overrides, values)
    return pipeline.run(ready, force=force, resume=resume, progress=progress)


def evaluate(
    path: str | Path,
    data: Source | None = None,
    *,
    against: str | Path | None = None,
    task: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    latency_tokens: Sequence[int] = (1, 256),
    latency_batches: Sequence[int] = (1,),
    batch: int = 8,
    benchmarks: Sequence[str] = (),
    shots: int | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint, or two side by side.

    Args:
        path: A checkpoint, block-sparse or dense.
        data: Held-out data, such as `sparsify.DataSpec(path="held_out.txt")`; without it quality is left out.
        against: A second checkpoint; the latencies of both are measured in turns.
        task: `auto`, or a recipe's task such as `causal-lm`.
        device: `auto` (a GPU if there is one) or any torch device.
        dtype: `auto` (each checkpoint's own) or a torch dtype's name.
        latency_tokens: Token counts of each sequence in a forward pass.
        latency_batches: How many such sequences a forward pass takes; each size is measured.
        batch: Samples in one forward pass of the quality measurement.
        benchmarks: Tasks of lm-eval by name, or task files of your own (`pip install 'block-sparsify[eval]'`).
        shots: Worked examples before each question of a benchmark; its own number by default.
        limit: Questions of each benchmark, the first ones; all by default.
        trust_remote_code: Run the Python code that a checkpoint brings with it.
        progress: Told about every batch.

    Returns:
        `task`, `columns` (by label; see `sparsify.stages.evaluate.evaluate_models`), `paths` (by label), `notes`
        (what could not be measured) and `environment`.

    Raises:
        CheckpointError: If a checkpoint cannot be loaded, or holds NaN or infinite weights.
        DataError: If the data cannot be read.
        ConfigError: If the model is of no task that can be scored, or a number is out of range; if a benchmark is
            unknown, or lm-eval is not installed.
    """
    from sparsify import benchmarks as public
    from sparsify.checkpoint import reader
    from sparsify.data import spec as data_files
    from sparsify.layers.swap import sparse_modules
    from sparsify.measure import environment
    from sparsify.plan import resolve_device, resolve_task
    from sparsify.runtime.progress import Progress
    from sparsify.stages.evaluate import evaluate_models

    progress = progress or Progress()
    counts = [("batch", batch), *(("token count", count) for count in latency_tokens)]
    for what, count in [*counts, *(("latency batch", size) for size in latency_batches)]:
        if count < 1:
            raise ConfigError(f"{what} {count} is out of range: it must be at least 1")
    if data is not None:
        data_files.check(data)
    public.check(benchmarks, task)
    place = resolve_device(device)
    models: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for source in (path,) if against is None else (against, path):
        with progress.task(f"loading {source}"):
            precision = None if dtype == "auto" else dtype
            model = reader.load(source, place, precision, None if task == "auto" else task, trust_remote_code)
        reader.check_weights(model)
        kind = "sparse" if sparse_modules(model) else "dense"
        label = kind if kind not in models else f"{kind}: {Path(source).name}"
        models[label], paths[label] = model, str(source)
    meant = resolve_task(task, str(path), type(next(iter(models.values()))).__name__)
    public.check(benchmarks, meant)
    processor = reader.load_processor(path, trust_remote_code)
    columns, notes = evaluate_models(
        models,
        processor,
        data,
        meant,
        latency_tokens=latency_tokens,
        latency_batches=latency_batches,
        batch=batch,
        questions=public.Questions(benchmarks, shots, limit),
        progress=progress,
    )
    return {"task": meant, "columns": columns, "paths": paths, "notes": notes, "environment": environment()}


def _settings(**values: Any) -> PruneStage:
    values = {
        key: list(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()
    }
    try:
        return PruneStage(stage="prune", **values)
    except ValidationError as error:
        raise ConfigError(describe(from_pydantic(error, PruneStage), None)) from error


def _attach(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    from sparsify.checkpoint.quantizer import attach

    if isinstance(model, PreTrainedModel):
        attach(model)
