"""The strict schema of a recipe: what to compress, with which data, in which stages.

    recipe = Recipe.load("recipes/magnitude_oneshot.yaml", overrides=["prune.sparsity=0.6"])

Every fault is reported in one `ConfigError`, each with its place in the YAML file; an unknown key is a fault and
comes with the nearest known one. `sparsify.recipe.file` reads the text, this module judges what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sparsify.allocation import scopes
from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockShape
from sparsify.data import spec as data_files
from sparsify.errors import ConfigError, SparsifyError
from sparsify.recipe.faults import Fault, check_trainer_arguments, describe, from_pydantic, order_faults
from sparsify.recipe.file import RecipeText, apply_overrides, locate
from sparsify.recipe.training import Distill, Lora, Patterns, Strict

Task: TypeAlias = Literal[
    "auto",
    "causal-lm",
    "masked-lm",
    "sequence-classification",
    "sentence-embedding",
    "seq2seq",
    "image-classification",
    "speech-classification",
]
Heal: TypeAlias = Literal["auto", "packed", "masked"]


def _share(value: Any) -> Any:
    """Refuses percentages with a hint; pydantic checks the rest."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= 100:
        hint = f"; for {value:g} % write {value / 100:g}" if 1 < value < 100 else ""
        raise ValueError(f"must be at least 0 and less than 1, got {value:g}{hint}")
    return value


Share: TypeAlias = Annotated[float, BeforeValidator(_share), Field(ge=0, lt=1)]
Block: TypeAlias = Annotated[BlockShape, PlainValidator(BlockShape.parse), PlainSerializer(str)]


def _scope(value: Any) -> Any:
    if not callable(value) and value not in scopes.BUILT_IN and ":" not in str(value):
        raise ValueError(f"got {value!r}, expected {', '.join(scopes.BUILT_IN)} or package.module:function")
    scope: Any = value
    scopes.requires(scope)
    return scope


Scope: TypeAlias = Annotated[Any, PlainValidator(_scope), PlainSerializer(scopes.name_of)]


def _method(value: Any) -> Any:
    from sparsify.pruner import find_pruner

    if not isinstance(value, str) or ":" not in value:
        find_pruner(value)
    return value


def _method_name(value: Any) -> str:
    from sparsify.pruner import name_of

    return name_of(value)


Method: TypeAlias = Annotated[Any, PlainValidator(_method), PlainSerializer(_method_name)]


def _column_names(value: Any) -> Any:
    columns = value if isinstance(value, (list, tuple)) else [value]
    return [str(column) if isinstance(column, int) else column for column in columns]


Columns: TypeAlias = Annotated[list[str], BeforeValidator(_column_names)]


class DataSpec(Strict):
    """One source of samples: a local file or folder, or a data set by its `datasets` name.

    Attributes:
        path: A .txt, .jsonl, .csv, .tsv or .parquet file, or a folder of them; or of pictures or recordings.
        name: Name for `datasets.load_dataset`; exactly one of `path` and `name` is given.
        config: Configuration of a named data set.
        split: Split of a named data set.
        columns: Columns to read: the text; text, picture or recording and label; text and target; or two sentences
            and their score. Numbers are positions, from 0, in a file without a header.
        length: Tokens in one sample.
        samples: At most this many samples; all of them when left out.
        stream: Read text while it is used instead of before; for `data.train` and a number of `steps`.
    """

    path: str | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    columns: Columns | None = None
    length: int = Field(default=512, ge=2)
    samples: int | None = Field(default=None, ge=1)
    stream: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.path is None) == (self.name is None):
            raise ValueError(
                "needs exactly one of `path` (a local file or folder) and `name` (a `datasets` name)"
            )
        return self


class Data(Strict):
    """The recipe's data: what `finetune`, `evaluate` and `calibrate` read."""

    train: DataSpec | None = None
    eval: DataSpec | None = None
    calibration: DataSpec | None = None


class Pruning(Strict):
    """How blocks are scored and how many are kept.

    Attributes:
        method: A registered pruner, such as `magnitude`, or `package.module:Class`; in Python also the class.
        options: Constructor arguments of the pruner.
        block: Block shape as OUTxIN, such as `64x64`.
        sparsity: Share of the selected weights to remove, from 0 to less than 1.
        scope: `global` (one budget), `layer` (each layer the same), `row` (each block row the same); or a density for
            each layer by its size (`erdos_renyi`), its outliers (`outlier`, needs calibration), what its loss costs
            (`sensitivity`, needs the file) or a function of your own (`package.module:function`).
        floor: Smallest density a layer may get, 0 to 1, except under `layer` and `row`; when left out a share of the
            mean density (`sparsify.allocation.budget.FLOOR_SHARE`).
        ceiling: Largest density a layer may get, 0 to 1, except under `layer` and `row`.
        sensitivity: For that scope, the file that `sparsify sensitivity` wrote.
        targets: Exact module names, `re:` patterns or class names; every layer of the model's blocks when left out.
        ignore: Layers to leave dense, named in the same three ways.
        permute: First put units that can change places (hidden units, value dimensions of heads) in an order that
            concentrates strong weights into blocks; the function stays as it is.
        per_position: Give each kernel position of a convolution a mask of its own, instead of one for all of them.
    """

    method: Method = "magnitude"
    options: dict[str, Any] = Field(default_factory=dict)
    block: Block = Field(default_factory=lambda: BlockShape(64, 64))
    sparsity: Share = 0.5
    scope: Scope = "global"
    floor: float | None = Field(default=None, ge=0, le=1)
    ceiling: float = Field(default=1.0, gt=0, le=1)
    sensitivity: str | None = None
    targets: Patterns | None = None
    ignore: Patterns | None = None
    permute: bool = False
    per_position: bool = False

    @model_validator(mode="after")
    def _usable(self) -> Pruning:
        from sparsify.pruner import create_pruner

        create_pruner(self.method, **self.options)
        if self.floor is not None and self.floor > self.ceiling:
            raise ValueError(f"floor {self.floor:g} is above ceiling {self.ceiling:g}")
        if self.scope == "sensitivity" and self.sensitivity is None:
            raise ValueError(
                "the scope sensitivity needs the key `sensitivity` (--sensitivity): the file that "
                "`sparsify sensitivity MODEL --data FILE` writes"
            )
        if self.scope != "sensitivity" and self.sensitivity is not None:
            name = scopes.name_of(self.scope)
            raise ValueError(f"the file in `sensitivity` is for the scope sensitivity, not for {name}")
        Budget(self.sparsity, self.scope, self.floor, self.ceiling, {})
        return self


class Search(Pruning):
    """Pruning while training, in three phases: warm-up, pruning, healing.

    Attributes:
        start: Share of the stage's steps, at its beginning, that trains the dense network by itself (warm-up).
        until: Share of the stage's steps after which the masks are fixed; the rest trains on under them (healing).
        schedule: `cubic`: sparsity rises step by step, and what is masked may come back (Zhu & Gupta 2017); `once`: all
            of it at the end of the phase; `auto`: the pruner's own schedule, and `cubic` for one that has none.
        every: Optimizer steps between two updates of the cubic schedule's masks; a hundredth of the phase when left
            out.
    """

    start: float = Field(default=0.0, ge=0, lt=1)
    until: float = Field(default=1.0, gt=0, le=1)
    schedule: Literal["auto", "cubic", "once"] = "auto"
    every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _phases(self) -> Search:
        from sparsify.pruner import create_pruner, is_cubic

        if self.start >= self.until:
            raise ValueError(
                f"start {self.start:g} is not before until {self.until:g}: no step is left to prune"
            )
        is_cubic(create_pruner(self.method, **self.options), self.schedule, self.every)
        return self


# Calibration tokens, where a recipe does not say how many samples: enough to tell inputs of wide layers apart and to
# reconstruct blocks; as in 128 samples of 512.
ENOUGH = 65_536


class CalibrateStage(Strict):
    """Collects the statistics that the next pruner asks for.

    Attributes:
        samples: How many; when left out as many as hold 65,536 tokens, or 128 of what has no tokens.
        batch: Samples in one forward pass.
    """

    stage: Literal["calibrate"]
    samples: int | None = Field(default=None, ge=1)
    batch: int = Field(default=8, ge=1)


class PruneStage(Pruning):
    """Scores the blocks once and fixes the masks.

    Attributes:
        reconstruct: Steps in which each transformer block's kept weights are then trained, alone, to put out what the
            dense block did; needs a `calibrate` stage before. 0 for none.
    """

    stage: Literal["prune"]
    reconstruct: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _at_once(self) -> PruneStage:
        from sparsify.pruner import find_pruner, name_of

        if find_pruner(self.method).in_training:
            raise ValueError(
                f"{name_of(self.method)} prunes while the network trains: name it as the `pruner` of a finetune stage, "
                f"or give it to SparsifyCallback or SparsifyLoop"
            )
        return self


class FinetuneStage(Strict):
    """Trains with the Hugging Face Trainer: with a `pruner` it searches the mask, without one it heals.

    Attributes:
        steps: Optimizer steps; give this or `epochs`. 0 leaves the stage out.
        epochs: Passes over the training data; 0 leaves the stage out.
        batch: Samples in one forward pass.
        accumulate: Forward passes in one optimizer step.
        learning_rate: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises from 0.
        weight_decay: Decoupled weight decay of AdamW.
        schedule: What the learning rate does after the warm-up, by its transformers name.
        precision: `float32`, or mixed precision over float32 weights; `auto` takes bfloat16 on a GPU that has it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third slower.
        dropout: Probability of dropout while training; the model's own when left out. 0 suits a student, whose teacher
            has none.
        pruner: Prune while training, and fix the exact mask at the end.
        heal: Train the kept blocks only (`packed`) or dense weights under their mask (`masked`); `auto` measures a
            step of each and takes the faster one.
        distill: Learn from a dense teacher too.
        lora: Train low-rank updates of packed blocks only, and merge them in the end.
        save_steps: Optimizer steps between two points from which `--resume` can go on; a tenth of the run when left
            out.
        trainer: Further `transformers.TrainingArguments`, other than those that the keys above decide.
    """

    stage: Literal["finetune"]
    steps: int | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, ge=0)
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    dropout: float | None = Field(default=None, ge=0, lt=1)
    pruner: Search | None = None
    heal: Heal = "auto"
    distill: Distill | None = None
    lora: Lora | None = None
    save_steps: int | None = Field(default=None, ge=1)
    trainer: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneStage:
        if (self.steps is None) == (self.epochs is None):
            hint = "" if self.steps is None else "; leave one out, or empty it, as in --set stages.1.epochs="
            raise ValueError(f"needs exactly one of `steps` and `epochs`{hint}")
        if self.skipped and self.pruner is not None:
            raise ValueError("a stage without steps cannot prune: give it some, or take its `pruner` away")
        return self

    @property
    def skipped(self) -> bool:
        """Whether the stage is left out."""
        return self.steps == 0 or self.epochs == 0

    @field_validator("trainer")
    @classmethod
    def _known_arguments(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        check_trainer_arguments(trainer)
        return trainer


class ConvertStage(Strict):
    """Fixes the weights' final form: packed blocks, or dense with zeros for other runtimes.

    Attributes:
        format: `block_sparse`, or `dense` for all layers.
        dense_where_slower: `auto` leaves single layers dense, with zeros, that this machine's measurements (`sparsify
            tune`) predict to run slower block-sparse; `never` packs them all the same, for the smaller file.
    """

    stage: Literal["convert"]
    format: Literal["block_sparse", "dense"] = "block_sparse"
    dense_where_slower: Literal["auto", "never"] = "auto"


class EvaluateStage(Strict):
    """Measures the model as it stands and adds a column `label` to the report's table.

    Attributes:
        label: Name of the column; when left out `dense`, `pruned` or `recovered`, as the model is.
        latency_tokens: Token counts of each sequence whose latency is measured; empty for none.
        latency_batches: How many such sequences one forward pass takes; each size is measured.
        batch: Samples in one forward pass of the quality measurement.
        benchmarks: Tasks of lm-eval by name, or task files of your own; see `sparsify.benchmarks`.
        shots: Worked examples before each question of a benchmark; its own number when left out.
        limit: Questions of each benchmark, the first ones; all when left out.
    """

    stage: Literal["evaluate"]
    label: str | None = None
    latency_tokens: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1, 256])
    latency_batches: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1])
    batch: int = Field(default=8, ge=1)
    benchmarks: list[str] = Field(default_factory=list)
    shots: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)


class ReportStage(Strict):
    """Writes `sparsify_report.json` and `.html` beside the weights and prints the table; always the last stage."""

    stage: Literal["report"]


Stage: TypeAlias = Annotated[
    CalibrateStage | PruneStage | FinetuneStage | ConvertStage | EvaluateStage | ReportStage,
    Field(discriminator="stage"),
]


class Recipe(Strict):
    """A whole compression job.

    Attributes:
        version: Version of this schema, 1.
        name: Short name, used in reports.
        description: One line: what the recipe is for.
        model: Local folder or hub id of the dense checkpoint.
        out: Folder to write; must not exist or be empty, unless the run is forced.
        task: What the model is for; decides its head, its loss and its quality measure. `auto` reads the checkpoint.
        classes: Of a classifier: `auto` keeps the checkpoint's, and takes those of `data.train` for a model without a
            head, which gets one; `data` takes those of `data.train`, and draws a head of another size anew.
        device: `auto` (GPU if there is one), or any torch device.
        dtype: `auto` (the checkpoint's), or a torch dtype's name.
        offload: Keep the model in main memory while it is pruned with calibration data, and bring one transformer
            block at a time to the device; for models larger than the GPU. What is packed then moves to the device.
        seed: Seed of everything random.
        from_scratch: Take only the configuration and the tokenizer of `model`; weights are drawn anew with `seed`.
        trust_remote_code: Run the Python code that a checkpoint brings with it.
        data: Data for `finetune`, `evaluate` and `calibrate`.
        stages: What to do, in order.

    Raises:
        ConfigError: From `load` and `from_dict`, with every fault of the recipe.
    """

    version: Literal[1]
    name: str = "recipe"
    description: str = ""
    model: str | None = None
    out: str | None = None
    task: Task = "auto"
    classes: Literal["auto", "data"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    offload: bool = False
    seed: int = Field(default=0, ge=0)
    from_scratch: bool = False
    trust_remote_code: bool = False
    data: Data = Field(default_factory=Data)
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _order(self, info: ValidationInfo) -> Recipe:
        if not (info.context or {}).get("order_checked"):
            faults = order_faults(self.model_dump(mode="json"))
            if faults:
                raise ValueError("; ".join(str(fault) for fault in faults))
        return self

    def taught_by(self, index: int) -> int | None:
        """The stage whose result teaches stage `index`: the last training of the dense model before it, if any.

        `None` if the stage has no teacher, or another one: the recipe's model, or a checkpoint that it names. What has
        learned from a teacher itself does not teach.
        """
        distill = getattr(self.stages[index], "distill", None)
        if distill is None or distill.teacher is not None:
            return None
        taught = None
        for earlier, stage in enumerate(self.stages[:index]):
            if isinstance(stage, PruneStage) or getattr(stage, "pruner", None) is not None:
                break
            if isinstance(stage, FinetuneStage) and stage.distill is None and not stage.skipped:
                taught = earlier
        return taught

    @classmethod
    def load(
        cls, source: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
    ) -> Recipe:
        """Reads a recipe file, or a recipe of the package by its name.

        Args:
            source: Path of a YAML file, or a name that `sparsify recipe list` shows.
            overrides: `key=value` settings applied in order, such as `stages.0.sparsity=0.6`, `prune.sparsity=0.6`
                or `data.train.path=corpus.txt`; the value is read as YAML.
            values: Top-level keys that win over the file, such as `{"model": "path/to/model"}`; `None` is skipped.

        Raises:
            ConfigError: If the file is missing, is not YAML, or is not a valid recipe: every fault at once.
        """
        text = locate(source)
        return cls._checked(text.data, text, overrides, values)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
    ) -> Recipe:
        """Builds a recipe from plain data, as `load` does from a file."""
        return cls._checked(dict(data), None, overrides, values)

    @classmethod
    def _checked(
        cls, data: dict, text: RecipeText | None, overrides: Sequence[str], values: Mapping[str, Any] | None
    ) -> Recipe:
        data = apply_overrides(data, overrides, cls.model_fields)
        data.update({key: value for key, value in (values or {}).items() if value is not None})
        faults: list[Fault] = order_faults(data)
        try:
            recipe = cls.model_validate(data, context={"order_checked": True})
        except ValidationError as error:
            recipe, faults = None, from_pydantic(error, cls) + faults
        except SparsifyError as error:
            raise ConfigError(f"{text.origin if text else 'recipe'}: {error}") from error
        if recipe is None or faults:
            raise ConfigError(describe(faults, text))
        return recipe

    @classmethod
    def oneshot(
        cls,
        pruning: Mapping[str, Any],
        options: Sequence[str],
        data: str | None,
        length: int = 512,
        dense_where_slower: str = "auto",
        samples: int | None = None,
        **values: Any,
    ) -> Recipe:
        """The recipe of `sparsify prune`: prune once, pack, report.

        Args:
            pruning: Keys of the prune stage; `None` is skipped.
            options: Options of the pruner, as `key=value`.
            data: File, folder or `datasets` name to calibrate with, if the pruner needs that.
            length: Tokens in one sample of that data.
            dense_where_slower: Of the convert stage.
            samples: Of the calibrate stage.
            **values: Top-level keys of the recipe.

        Raises:
            ConfigError: With every fault.
        """
        for option in options:
            if "=" not in option:
                raise ConfigError(f"--option {option}: expected key=value, such as norm=l1")
        convert = {"stage": "convert", "dense_where_slower": dense_where_slower}
        stages: list[dict[str, Any]] = [{"stage": "prune"}, convert, {"stage": "report"}]
        stages[0] |= {key: value for key, value in pruning.items() if value is not None}
        recipe: dict[str, Any] = {"version": 1, "name": "prune", "stages": stages}
        if data is not None:
            spec = data_files.DataSpec.parse(data)
            place = (
                {"path": str(spec.path)}
                if spec.path is not None
                else {"name": spec.name, "config": spec.config}
            )
            recipe["data"] = {"calibration": {**place, "length": length}}
            stages.insert(0, {"stage": "calibrate", "samples": samples})
        return cls.from_dict(recipe, [f"prune.options.{option}" for option in options], values)

    def to_yaml(self) -> str:
        """The recipe as YAML text that `load` reads back to an equal recipe; defaults are spelled out."""
        data = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
