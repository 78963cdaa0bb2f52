"""What a recipe is going to do, worked out before any weight is loaded; a dry run and a real one check the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import benchmarks, sensitivity_file
from sparsify.allocation import scopes
from sparsify.checkpoint import reader, writer
from sparsify.data import spec as data
from sparsify.errors import CheckpointError, ConfigError, OutputError, SparsifyError
from sparsify.prediction import predict, warning
from sparsify.preparation import selected
from sparsify.pruner import PrunableLayer, name_of
from sparsify.recipe.schema import (
    CalibrateStage,
    ConvertStage,
    EvaluateStage,
    FinetuneStage,
    PruneStage,
    Pruning,
    Recipe,
)
from sparsify.targets import KeptDense

# A Trainer's checkpoint holds float32 weights and AdamW's two moments; while a new one is written, the old one stays.
CHECKPOINT_BYTES_PER_PARAMETER = 12
CHECKPOINTS_AT_ONCE = 2


@dataclass(frozen=True)
class PlannedLayer:
    """One weight matrix that will be pruned, `shape` `(N, K)` on a `grid` of blocks."""

    name: str
    shape: tuple[int, int]
    block: str
    grid: tuple[int, int]


@dataclass
class Plan:
    """What will happen.

    Attributes:
        model: The source checkpoint.
        architecture: Class of the model.
        task: Its task; `None` if it is of none that can be trained or scored.
        out: The output folder, if the recipe writes one.
        stages: One line for each stage.
        layers: What will be pruned; of the last pruning, if there are several.
        sparsity: Share of these layers' weights that will be removed.
        scope: How that share is spread over layers.
        kept_dense: Layers that stay dense, and why.
        bytes_dense: Bytes of the dense weights.
        bytes_out: Estimated bytes of the weights to be written.
        bytes_work: Estimated bytes of the work folder while the run goes on.
        notes: What the user should know before the run.
        new_head: Whether the model gets a classification head for the classes of `data.train`.
    """

    model: str
    architecture: str
    task: str | None
    out: str | None
    stages: list[str]
    layers: list[PlannedLayer] = field(default_factory=list)
    sparsity: float = 0.0
    scope: str = "global"
    kept_dense: list[KeptDense] = field(default_factory=list)
    bytes_dense: int = 0
    bytes_out: int = 0
    bytes_work: int = 0
    notes: list[str] = field(default_factory=list)
    new_head: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def make_plan(recipe: Recipe, *, force: bool = False) -> Plan:
    """Checks everything about a recipe that can be checked without loading weights.

    A local checkpoint's files are checked for completeness by their headers; of a model on the Hub only the config
    is fetched.

    Args:
        recipe: The recipe.
        force: Whether an existing checkpoint in the output folder may be replaced.

    Raises:
        ConfigError: If the recipe lacks a model or an output folder, or names an unusable device.
        CheckpointError: If the model's files are missing, damaged or unsafe.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        DataError: If a local data file is missing or empty.
        OutputError: If the output folder exists, cannot be written, or does not fit on its disk.
    """
    if recipe.model is None:
        raise ConfigError("the recipe names no model: give --model, or `model:` in the recipe")
    if writes(recipe) and recipe.out is None:
        raise ConfigError("the recipe names no output folder: give --out, or `out:` in the recipe")
    out = recipe.out if writes(recipe) else None
    if out is not None:
        writer.check_output(out, force, 0)
        _refuse_own_folder(recipe)
    device = resolve_device(recipe.device)
    for spec in used_data(recipe):
        data.check(spec)
    if Path(recipe.model).expanduser().exists() or recipe.model.startswith(("/", ".", "~")):
        reader.check_source(recipe.model, recipe.trust_remote_code, weights=not recipe.from_scratch)
    model = skeleton(recipe)
    plan = Plan(
        model=recipe.model,
        architecture=type(model).__name__,
        task=resolve_task(recipe.task, recipe.model, type(model).__name__),
        out=out,
        stages=[describe(recipe, index) for index in range(len(recipe.stages))],
        bytes_dense=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    )
    if recipe.from_scratch:
        plan.notes.append(
            f"from_scratch: weights are drawn anew with seed {recipe.seed}, not read from {recipe.model}"
        )
    _needs_task(recipe, plan)
    plan.new_head = needs_head(recipe, model, plan.task)
    _check_head(recipe, plan)
    _check_teachers(recipe, plan)
    _check_adapters(recipe)
    _check_reporting(recipe)
    for stage in recipe.stages:
        if isinstance(stage, EvaluateStage):
            benchmarks.check(stage.benchmarks, plan.task)
    if recipe.offload and device.type == "cpu":
        plan.notes.append("offload: there is no GPU to work on, so nothing is offloaded")
    removed = _plan_layers(recipe, model, plan, device)
    plan.bytes_out = plan.bytes_dense - removed if out is not None else 0
    if _trains(recipe):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trainer = CHECKPOINTS_AT_ONCE * CHECKPOINT_BYTES_PER_PARAMETER * parameters
        teachers = {recipe.taught_by(index) for index in range(len(recipe.stages))} - {None}
        plan.bytes_work = trainer + plan.bytes_dense * (1 + len(teachers))
    if out is not None:
        writer.check_output(out, force, plan.bytes_out + plan.bytes_work)
    return plan


def writes(recipe: Recipe) -> bool:
    """Whether a recipe changes the model, and so has something to write."""
    return any(stage.stage not in ("evaluate", "report") for stage in recipe.stages)


def used_data(recipe: Recipe) -> list[Any]:
    """The data sources that some stage reads."""
    kinds = {type(stage) for stage in recipe.stages}
    used = {
        FinetuneStage: recipe.data.train,
        EvaluateStage: recipe.data.eval,
        CalibrateStage: recipe.data.calibration,
    }
    return [spec for kind, spec in used.items() if kind in kinds and spec is not None]


def resolve_device(name: str) -> torch.device:
    """The device that a recipe's `device` means; `auto` is a GPU if there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; try auto, cpu or cuda") from error
    return device


def resolve_task(task: str, model: str, architecture: str) -> str | None:
    """The task given, or for `auto` the one that the class of the checkpoint `model` is for, if it is for one."""
    if task != "auto":
        return task
    from transformers.models.auto import modeling_auto

    # Their names tell too little: Wav2Vec2ForSequenceClassification, T5ForConditionalGeneration.
    if architecture in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values():
        return "speech-classification"
    if architecture in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "seq2seq"
    endings = {
        "ForCausalLM": "causal-lm",
        "LMHeadModel": "causal-lm",
        "ForMaskedLM": "masked-lm",
        "ForSequenceClassification": "sequence-classification",
        "ForImageClassification": "image-classification",
    }
    for ending, meant in endings.items():
        if architecture.endswith(ending):
            return meant
    is_encoder = (Path(model).expanduser() / "modules.json").is_file()  # a sentence-transformers checkpoint
    return "sentence-embedding" if is_encoder and architecture.endswith("Model") else None


CLASSIFICATIONS = ("sequence-classification", "image-classification", "speech-classification")


def needs_head(recipe: Recipe, model: nn.Module, task: str | None) -> bool:
    """Whether a classifier gets a head for the classes of its training data.

    Args:
        recipe: The recipe.
        model: What `skeleton` made of it; its config tells what the checkpoint was saved from.
        task: The recipe's task, not `auto`.
    """
    if task not in CLASSIFICATIONS or recipe.data.train is None:
        return False
    config: Any = model.config
    saved = config.architectures or []
    # Of a checkpoint that does not say what it was saved from, whatever it has stays.
    has_head = not saved or task in {resolve_task("auto", recipe.model or "", name) for name in saved}
    return recipe.classes == "data" or (_trains(recipe) and not has_head)


def _trains(recipe: Recipe) -> bool:
    return any(isinstance(stage, FinetuneStage) and not stage.skipped for stage in recipe.stages)


def skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's model on the meta device: every module and shape, no weights.

    Raises:
        CheckpointError: If the config cannot be read or no class of transformers fits it.
    """
    import transformers

    from sparsify.checkpoint.format import QUANT_METHOD
    from sparsify.checkpoint.skeleton import build

    assert recipe.model is not None
    try:
        config = transformers.AutoConfig.from_pretrained(
            recipe.model, trust_remote_code=recipe.trust_remote_code
        )
        dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else config.dtype or torch.float32
        task_class = reader.TASKS.get(recipe.task)
        named = [name for name in config.architectures or [] if hasattr(transformers, name)]
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = dict(quantization).get("quant_method")
            if method == QUANT_METHOD and not recipe.from_scratch:
                return build(config)
            raise CheckpointError(
                f"{recipe.model} is quantized ({method}), which cannot be pruned or trained here: take the model in "
                f"float32, float16 or bfloat16"
            )
        with torch.device("meta"):
            if task_class is None and named:
                return getattr(transformers, named[0])._from_config(config, dtype=dtype)
            auto = getattr(transformers, task_class or "AutoModel")
            return auto.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    except SparsifyError:
        raise
    except Exception as error:  # whatever a damaged config makes transformers stumble over
        reason = reader.first_line(error)
        if not Path(recipe.model).expanduser().exists():
            raise CheckpointError(
                f"{recipe.model} is neither a folder nor a model that the Hub gives us: {reason}"
            ) from error
        raise CheckpointError(f"cannot make the model of {recipe.model}: {reason}") from error


def describe(recipe: Recipe, index: int) -> str:
    """A stage in one line."""
    stage = recipe.stages[index]
    if isinstance(stage, CalibrateStage):
        enough = "as many samples as hold 65,536 tokens, or 128 without tokens"
        return f"calibrate: {f'{stage.samples} samples' if stage.samples else enough}"
    if isinstance(stage, PruneStage):
        return f"prune: {_pruning(stage)}"
    if isinstance(stage, FinetuneStage) and stage.skipped:
        return "finetune: left out"
    if isinstance(stage, FinetuneStage):
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        how = f"healing ({stage.heal})" if _prunes(recipe.stages[:index]) else "all weights that are there"
        if stage.pruner is not None:
            how = f"searching with {_pruning(stage.pruner)}"
        if stage.lora is not None:
            how = f"low-rank updates of packed blocks, rank {stage.lora.rank}"
        if stage.distill is not None:
            how += f", learning from {stage.distill.teacher or 'the dense model'}"
        return f"finetune: {length} of {stage.batch * stage.accumulate} samples, {how}"
    if isinstance(stage, ConvertStage):
        return f"convert: {stage.format}"
    if isinstance(stage, EvaluateStage):
        return "evaluate" + (f": {stage.label}" if stage.label else "")
    return stage.stage


def _prunes(stages: Sequence[Any]) -> bool:
    return any(isinstance(stage, PruneStage) or getattr(stage, "pruner", None) for stage in stages)


def _pruning(settings: Pruning) -> str:
    order = ", units reordered first" if settings.permute else ""
    blocks = f"{settings.sparsity:.0%} in blocks of {settings.block}"
    steps = getattr(settings, "reconstruct", 0)
    after = f", each transformer block reconstructed in {steps} steps" if steps else ""
    scope = scopes.name_of(settings.scope)
    return f"{name_of(settings.method)}, {blocks}, scope {scope}{order}{after}"


def _packs(stage: Any) -> bool:
    if isinstance(stage, ConvertStage):
        return stage.format == "block_sparse"
    return isinstance(stage, FinetuneStage) and stage.heal == "packed" and not stage.skipped


def _needs_task(recipe: Recipe, plan: Plan) -> None:
    needs = [stage.stage for stage in recipe.stages if stage.stage in ("calibrate", "finetune")]
    if recipe.data.eval is not None:
        needs += [stage.stage for stage in recipe.stages if stage.stage == "evaluate"]
    if plan.task is None and needs:
        raise ConfigError(
            f"the {needs[0]} stage must know what {plan.architecture} is for: set `task` to one of "
            f"{', '.join(reader.TASKS)}; models for anything else can be pruned, but not trained or scored here"
        )


def _check_head(recipe: Recipe, plan: Plan) -> None:
    """Checks that classes from the data are for a classifier, and that something trains its new head."""
    if recipe.classes == "data" and not plan.new_head:
        raise ConfigError(
            f"classes: data is for the tasks {', '.join(CLASSIFICATIONS)} with data.train; this recipe's task is "
            f"{plan.task}{'' if recipe.data.train else ', without data.train'}"
        )
    if not plan.new_head:
        return
    if not _trains(recipe):
        raise ConfigError("classes: data makes a new head, and no finetune stage trains it: add one")
    plan.notes.append("classes: the head is made for the labels of data.train")


def _check_adapters(recipe: Recipe) -> None:
    if any(getattr(stage, "lora", None) is not None for stage in recipe.stages) and find_spec("peft") is None:
        raise ConfigError("lora needs PEFT, which is not installed: pip install 'block-sparsify[peft]'")


def _check_teachers(recipe: Recipe, plan: Plan) -> None:
    """Checks what can be known of the teachers without loading them."""
    from sparsify.training.distillation import Weights
    from sparsify.training.teacher_cache import check_cacheable

    task = plan.task
    for index, stage in enumerate(recipe.stages):
        settings = getattr(stage, "distill", None)
        if settings is None or task is None:
            continue
        if plan.new_head and settings.teacher is None and recipe.taught_by(index) is None:
            raise ConfigError(
                f"stage {index} learns from {recipe.model}, whose head for {task} would be new and know nothing: train "
                f"the dense model in a finetune stage before the first pruning (in the recipes that begin with one, "
                f"--set stages.0.epochs=3), or name a trained teacher as distill.teacher"
            )
        Weights.of(settings, task)
        if settings.teacher_memory == "cache":
            check_cacheable(task, recipe.data.train is not None and recipe.data.train.stream)
        teacher = settings.teacher
        if teacher is not None and (
            Path(teacher).expanduser().exists() or teacher.startswith(("/", ".", "~"))
        ):
            reader.check_source(teacher, recipe.trust_remote_code)


def _check_reporting(recipe: Recipe) -> None:
    """Checks that whatever the Trainer is to report to is installed."""
    asked = [getattr(stage, "trainer", {}).get("report_to") or [] for stage in recipe.stages]
    names = {name for one in asked for name in ([one] if isinstance(one, str) else one)} - {"none", "all"}
    if not names:
        return
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    missing = sorted(names - {*get_available_reporting_integrations()})
    if missing:
        raise ConfigError(
            f"report_to: {missing[0]} is not installed, or transformers does not know it: pip install {missing[0]}, or "
            f"leave it out"
        )


def _plan_layers(recipe: Recipe, model: nn.Module, plan: Plan, device: torch.device) -> int:
    """Fills in what will be pruned, and what that promises on this device; returns the bytes that packing will save."""
    packs = any(_packs(stage) for stage in recipe.stages)
    all_packed = any(getattr(stage, "dense_where_slower", "") == "never" for stage in recipe.stages)
    saved: dict[str, int] = {}
    notes: dict[str, None] = {}
    pruned: dict[str, int] = {}
    for index, stage in enumerate(recipe.stages):
        settings = stage if isinstance(stage, PruneStage) else getattr(stage, "pruner", None)
        if settings is None:
            continue
        selection = selected(model, settings)
        if settings.sensitivity is not None:
            sensitivity_file.curves_for(settings.sensitivity, selection.layers)
        plan.layers = [
            PlannedLayer(layer.name, layer.shape, str(layer.block), layer.grid) for layer in selection.layers
        ]
        again = {layer.name for layer in selection.layers} & pruned.keys()
        if settings.permute and again:
            raise ConfigError(
                f"stage {index} cannot reorder units: {min(again)} is pruned by stage {pruned[min(again)]} already; "
                f"move permute to that stage"
            )
        pruned |= {layer.name: index for layer in selection.layers}
        plan.kept_dense = selection.dense
        plan.sparsity, plan.scope = settings.sparsity, scopes.name_of(settings.scope)
        if not packs:
            continue
        # Nothing is measured of convolutions, nor of experts and recurrent layers, whose matrices have their own names.
        judged = [
            layer for layer in selection.layers if layer.name == layer.module_name and layer.conv is None
        ]
        names = {layer.name for layer in judged}
        shapes, dtype = [layer.shape for layer in judged], selection.layers[0].parameter.dtype
        line = warning(device, dtype, settings.block, shapes, settings.sparsity)
        notes |= {line: None} if line is not None else {}
        found = {
            shape: predict(device, dtype, settings.block, shape, 1 - settings.sparsity)
            for shape in set(shapes)
        }
        slower = {
            shape for shape, prediction in found.items() if prediction is not None and prediction.slower
        }
        for layer in selection.layers:
            stays_dense = layer.name in names and layer.shape in slower and not all_packed
            saved[layer.name] = 0 if stays_dense else _saved_bytes(layer, settings.sparsity)
    plan.notes += notes
    return sum(saved.values())


def _saved_bytes(layer: PrunableLayer, sparsity: float) -> int:
    """Estimated bytes that packing saves in one layer that loses its average share of blocks."""
    size = layer.parameter.element_size()
    rows, cols = layer.grid
    blocks = round((1 - sparsity) * rows * cols)
    packed = blocks * (layer.block.numel * size + 4) + 4 * (rows + 1)
    return layer.shape[0] * layer.shape[1] * size - packed


def _refuse_own_folder(recipe: Recipe) -> None:
    source, out = Path(recipe.model or "").expanduser(), Path(recipe.out or "").expanduser()
    if source.is_dir() and source.resolve() == out.resolve():
        raise OutputError(f"{recipe.out} is the model's own folder: choose another output folder")
