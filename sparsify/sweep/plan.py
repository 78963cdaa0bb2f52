"""What a sweep will do, checked without loading weights: pairs, recipes, workloads, and what the folder holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.workloads import positive, sample_inputs, workloads
from sparsify.blocks import BlockShape
from sparsify.checkpoint import reader
from sparsify.data import spec as data_files
from sparsify.errors import ConfigError, OutputError
from sparsify.kernels.tuning_files import device_name
from sparsify.plan import resolve_device, resolve_task, skeleton
from sparsify.pruner import default_method
from sparsify.recipe.schema import Recipe
from sparsify.sweep import file as sweep_file
from sparsify.sweep.file import Swept
from sparsify.targets import select

FILE = "sweep.json"
DTYPES = ("auto", "float32", "float16", "bfloat16")

Pair = tuple[str, float]


class SweepPlan:
    """A sweep that can be run.

    Args:
        model: The dense checkpoint.
        blocks: Block shapes.
        sparsities: Shares of the weights to remove, above 0 and below 1.
        evaluation: Held-out data, on which the best choice is made.
        out: Folder of `sweep.json`, `sweep.png` and the scores.
        data: Calibration data: file, folder or `datasets` name; `None` for a pruner that needs none.
        pruning: Further keys of a recipe's prune stage, such as `method` and `scope`; `None` is skipped.
        options: Options of the pruner, as `key=value`.
        length: Tokens in one calibration sample.
        samples: Calibration samples; by default as many as hold 65,536 tokens.
        dense_where_slower: As in a recipe's convert stage.
        tokens: Tokens of each sequence whose speed is measured.
        batches: Sequences (pictures, recordings) at once.
        repeats: Rounds of each race, at most.
        batch: Samples in one forward pass of the quality measurement.
        max_loss: For the best choice; see `front.best`.
        minutes: Begin no pair after this time.
        force: Start over.
        dtype: What the models are judged and timed in: `auto` (the checkpoint's), `float32`, `float16`, `bfloat16`.
        **values: Top-level keys of a recipe: `device`, `task`, `seed`, `trust_remote_code`.

    Attributes:
        pairs: Block shapes and sparsities, those of one block shape together.
        recipes: For each pair the recipe of its pruning.
        device: Where.
        task: What the model is for.
        processor: Its tokenizer, image processor or feature extractor.
        works: What the speed is measured in.
        notes: In words what cannot be measured.
        settings: Everything that decides a row but its pair and the weights.
        found: What the folder holds, if that is to go on.

    Raises:
        ConfigError: If an argument is wrong, the held-out data are a test split or those of the calibration, or the
            folder holds a sweep with other settings.
        CheckpointError: If the checkpoint is missing or damaged.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        DataError: If data are missing.
        OutputError: If `out` is a file.
    """

    def __init__(
        self,
        model: str,
        blocks: Sequence[str],
        sparsities: Sequence[float],
        evaluation: data_files.DataSpec,
        out: str | Path,
        *,
        data: str | None = None,
        pruning: Mapping[str, Any] | None = None,
        options: Sequence[str] = (),
        length: int = 512,
        samples: int | None = None,
        dense_where_slower: str = "auto",
        tokens: Sequence[int] | str = (256,),
        batches: Sequence[int] | str = (1,),
        repeats: int = 20,
        batch: int = 32,
        max_loss: float | None = None,
        minutes: float | None = None,
        force: bool = False,
        dtype: str = "auto",
        **values: Any,
    ) -> None:
        self.model, self.evaluation = model, evaluation
        self.out = Path(out).expanduser()
        self.file = self.out / FILE
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, expected a folder")
        counts, sizes = positive("tokens", tokens), positive("batches", batches)
        self.repeats, self.batch, self.max_loss, self.minutes = repeats, batch, max_loss, minutes
        for name, value in (("repeats", repeats), ("batch", batch)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        if max_loss is not None and not max_loss >= 0:
            raise ConfigError(f"max-loss: got {max_loss:g}, expected 0 or more")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: got {dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.pairs = _pairs(blocks, sparsities)
        given = {key: value for key, value in (pruning or {}).items() if value is not None}
        chosen = default_method(data is not None, given.pop("method", None), given.pop("reconstruct", None))
        given |= dict(zip(("method", "reconstruct"), chosen, strict=True))
        self.recipes = {
            (block, sparsity): Recipe.oneshot(
                given | {"block": block, "sparsity": sparsity},
                options,
                data,
                length,
                dense_where_slower,
                samples,
                model=model,
                **values,
            )
            for block, sparsity in self.pairs
        }
        self.recipe = next(iter(self.recipes.values()))
        if Path(model).expanduser().exists() or model.startswith(("/", ".", "~")):
            reader.check_source(model, self.recipe.trust_remote_code)
        calibration = self.recipe.data.calibration
        for spec in (evaluation, calibration):
            if spec is not None:
                data_files.check(spec)
        _refuse_as_held_out(evaluation, calibration)
        self.device = resolve_device(self.recipe.device)
        empty = skeleton(self.recipe)
        self.task = resolve_task(self.recipe.task, model, type(empty).__name__)
        if self.task is None:
            raise ConfigError(
                f"the quality of {type(empty).__name__} depends on what it is for: set --task to one of "
                f"{', '.join(reader.TASKS)}"
            )
        for recipe in self.recipes.values():
            stage: Any = next(stage for stage in recipe.stages if stage.stage == "prune")
            select(empty, stage.block, stage.targets, stage.ignore)
        self.processor = reader.load_processor(model, self.recipe.trust_remote_code)
        sample = sample_inputs(self.processor, self.task)
        self.works, self.notes = workloads(empty, self.task, counts, sizes, sample)
        if not self.works:
            raise ConfigError(f"there is no speed to measure: {self.notes[0]}")
        self.settings = self._settings(self.dtype or next(empty.parameters()).dtype)
        self.found = None if force else self._earlier()

    def missing(self, found: Swept | None) -> list[Pair]:
        """The pairs that a sweep has no rows for yet, in order."""
        known = {(row["block"], row["sparsity"]) for row in found.rows} if found is not None else set()
        return [pair for pair in self.pairs if pair not in known]

    def _settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """Everything that decides a row but its block shape and sparsity, and the weights, which the dense quality
        stands for.
        """
        recipe, calibration = self.recipe, self.recipe.data.calibration
        stages = {
            f"{stage.stage}.{key}": value
            for stage in recipe.stages
            for key, value in stage.model_dump(
                mode="json", exclude={"stage", "block", "sparsity", "batch"}
            ).items()
        }
        return {
            "model": Path(self.model).name,
            "task": self.task,
            **stages,
            "calibration": None if calibration is None else data_files.fingerprint(calibration),
            "evaluation": data_files.fingerprint(self.evaluation),
            "evaluated_on": _name(self.evaluation),
            "seed": recipe.seed,
            "device": device_name(self.device),
            "dtype": str(dtype).removeprefix("torch."),
            "workloads": [str(work) for work in self.works],
        }

    def _earlier(self) -> Swept | None:
        """The sweep that the folder holds, which is to go on."""
        if not self.file.exists():
            return None
        found = sweep_file.read(self.file)
        differ = sorted(key for key in self.settings if self.settings[key] != found.settings.get(key))
        # Where nothing is left to be measured, another machine may choose anew, or draw.
        if differ and (differ != ["device"] or self.missing(found)):
            raise ConfigError(
                f"{self.file} was measured with another {' and another '.join(differ)}: name another folder with "
                f"--out, or start over with --force"
            )
        return found


def _pairs(blocks: Sequence[str], sparsities: Sequence[float]) -> list[Pair]:
    """All pairs, those of one block shape together, so that they share its scores."""
    shapes = list(dict.fromkeys(str(BlockShape.parse(block)) for block in blocks))
    shares = sorted(set(sparsities))
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or not shares:
        got = f"{wrong[0]:g}" if wrong else "none"
        raise ConfigError(f"sparsities: got {got}, expected above 0 and below 1")
    if not shapes:
        raise ConfigError("blocks: got none, expected shapes such as 32x32,128x16")
    return [(shape, share) for shape in shapes for share in shares]


def _refuse_as_held_out(evaluation: Any, calibration: Any) -> None:
    """A best choice made on test data is a look at the answers; one made on calibration data says nothing."""
    named = evaluation.split if evaluation.path is None else Path(evaluation.path).stem
    if "test" in re.split(r"[^a-z]+", named.lower()):
        raise ConfigError(
            f"--eval {_name(evaluation)} looks like a test split, and nothing may be chosen on test data: give the "
            f"validation (dev) split"
        )
    if calibration is None or (evaluation.path is None) != (calibration.path is None):
        return
    if evaluation.path is not None:
        seen = Path(evaluation.path).resolve().is_relative_to(Path(calibration.path).resolve())
    else:
        seen = _name(evaluation) == _name(calibration)
    if seen:
        raise ConfigError(
            f"--eval {_name(evaluation)} is part of --data: give held-out data, which calibration does not see"
        )


def _name(spec: Any) -> str:
    """Data in words: a file's name, or a data set's with its split."""
    if spec.path is not None:
        return Path(spec.path).name
    return ":".join(part for part in (spec.name, spec.config, spec.split) if part)
