"""What each layer's loss costs: one layer pruned at a time, at a few sparsities, the loss on calibration data measured.

Per-layer sensitivity in the sense of Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient
Neural Networks" (2015), figure 6, with blocks for weights. What the layers do to each other is left out.

The loss is that of the task: cross-entropy of language models and classifiers, in nats. A sentence encoder has none
without people's scores, and theirs would fall where pruning happens to please them; its loss is 1 - cosine between the
embeddings before and after.

Each layer's result is written to a JSON file as soon as it is there (`sparsify.sensitivity_file`), so that an
interrupted measurement goes on where it stopped, and the scope `sensitivity` reads it at any budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import plots, sensitivity_file
from sparsify.allocation.budget import allocate
from sparsify.calibration.statistics import collect_statistics, needs_calibration
from sparsify.checkpoint import reader
from sparsify.data import spec as data_files
from sparsify.errors import ConfigError, SparsifyError
from sparsify.plan import resolve_device, resolve_task, skeleton
from sparsify.preparation import selected
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.recipe.schema import CalibrateStage, PruneStage, Recipe
from sparsify.runtime.progress import Advance, Progress
from sparsify.sensitivity_file import Measured
from sparsify.training.samples import Batch, in_dtype, load_samples

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
EMBEDDING_LOSS, TASK_LOSS = "1 - cosine with the dense embeddings", "nats"


def default_file(model: str) -> Path:
    """Where a measurement of this model is kept: beside its folder, or for a name on the Hub in the current one."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}.sensitivity.json")
    return Path(f"{path.name}.sensitivity.json")


def make_recipe(
    model: str,
    data: data_files.DataSpec,
    pruning: Mapping[str, Any],
    options: Sequence[str] = (),
    *,
    samples: int = 64,
    batch: int = 8,
    **values: Any,
) -> Recipe:
    """The measurement as a recipe of a calibration and a pruning, which is how it is checked.

    Args:
        model: The dense checkpoint.
        data: Calibration data.
        pruning: Keys of the prune stage: `method`, `block`, `targets`, `ignore`; `None` is skipped.
        options: Options of the pruner, as `key=value`.
        samples: Number of samples, spread evenly over the data.
        batch: Samples in one forward pass.
        **values: Top-level keys of the recipe.

    Raises:
        ConfigError: With every fault.
    """
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--option {option}: expected key=value, such as norm=l1")
    place = {"path": str(data.path)} if data.path is not None else {"name": data.name, "config": data.config}
    columns = None if data.columns is None else list(data.columns)
    spec = {**place, "split": data.split, "length": data.length, "columns": columns}
    stages = [
        {"stage": "calibrate", "samples": samples, "batch": batch},
        {"stage": "prune"} | {key: value for key, value in pruning.items() if value is not None},
    ]
    recipe = {"version": 1, "data": {"calibration": spec}, "stages": stages}
    return Recipe.from_dict(
        recipe, [f"prune.options.{option}" for option in options], {"model": model, **values}
    )


class Sensitivity:
    """One measurement.

    Args:
        recipe: From `make_recipe`.
        sparsities: Shares of a layer's elements to remove, above 0 and below 1.
        file: JSON file to write, or to go on with; by default `default_file`.
        force: Measure anew what the file holds already.
        progress: Told about every layer.

    Raises:
        ConfigError: If a sparsity, the device, the task or the file is unusable.
        CheckpointError: If the checkpoint is missing or damaged.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        DataError: If the data are missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        sparsities: Sequence[float] = SPARSITIES,
        file: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        assert recipe.model is not None and recipe.data.calibration is not None
        self.recipe, self.progress, self.force = recipe, progress or Progress(), force
        self.file = default_file(recipe.model) if file is None else Path(file).expanduser()
        calibrate, pruning = recipe.stages
        assert isinstance(calibrate, CalibrateStage) and isinstance(pruning, PruneStage)
        self.calibrate, self.pruning = calibrate, pruning
        self.sparsities = sorted(set(sparsities))
        wrong = [sparsity for sparsity in self.sparsities if not 0 < sparsity < 1]
        if wrong or not self.sparsities:
            got = f"{wrong[0]:g}" if wrong else "none"
            raise ConfigError(f"sparsity: got {got}, expected above 0 and below 1")
        if Path(recipe.model).expanduser().exists() or recipe.model.startswith(("/", ".", "~")):
            reader.check_source(recipe.model, recipe.trust_remote_code)
        data_files.check(recipe.data.calibration)
        self.device = resolve_device(recipe.device)
        model = skeleton(recipe)
        self.task = resolve_task(recipe.task, recipe.model, type(model).__name__)
        if self.task is None:
            raise ConfigError(
                f"the loss of {type(model).__name__} depends on what it is for: set --task to causal-lm, masked-lm, "
                f"sequence-classification or sentence-embedding"
            )
        self.layers = self._select(model)

    def run(self) -> Measured:
        """Measures every layer that the file does not hold yet, and draws the picture beside it.

        Raises:
            ConfigError: If the file was left by a measurement with other settings.
            SparsifyError: If a loss is no finite number.
            OutputError: If the file cannot be written.
            KeyboardInterrupt: On Ctrl-C; what was measured before is kept, and the text says so.
        """
        recipe = self.recipe
        assert recipe.model is not None
        settings = self._settings()
        found = self._earlier(settings)
        if found is None or found.left:
            with self.progress.task(f"loading {recipe.model}"):
                dtype = None if recipe.dtype == "auto" else recipe.dtype
                task = None if recipe.task == "auto" else recipe.task
                model = reader.load(recipe.model, self.device, dtype, task, recipe.trust_remote_code)
                reader.check_weights(model)
                batches = self._batches(model)
            pruner = create_pruner(self.pruning.method, **self.pruning.options)
            layers = self._select(model)
            if needs_calibration(pruner):
                inputs = [
                    {key: value for key, value in batch.items() if key != "labels"} for batch in batches
                ]
                with self.progress.task("calibrating"):
                    collect_statistics(model, layers, pruner, inputs, self.device)
            try:
                found = self._measure(
                    model, layers, pruner, _Loss(model, batches, self.task), found, settings
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted: what was measured is kept in {self.file}; run it again to go on"
                ) from None
        plots.sensitivity(found.curves, self.file.with_suffix(".png"), loss=found.unit)
        return found

    @torch.no_grad()
    def _measure(
        self,
        model: nn.Module,
        layers: list[PrunableLayer],
        pruner: Pruner,
        loss: _Loss,
        found: Measured | None,
        settings: dict[str, Any],
    ) -> Measured:
        with self.progress.task("loss of the dense model", loss.batches) as advance:
            dense = loss(advance)
        if not math.isfinite(dense):
            raise SparsifyError(
                f"the loss of {self.recipe.model} is {dense}: the checkpoint or the data is damaged"
            )
        if found is None:
            found = Measured(settings, dense, loss.unit, left=len(layers))
        elif abs(dense - found.loss) > 1e-3 * max(abs(dense), 1e-3):
            raise ConfigError(
                f"{self.file} was measured on a model whose loss is {found.loss:.6g}, this one's is {dense:.6g}: start "
                f"over with --force"
            )
        found.write(self.file)
        known = found.curves
        with self.progress.task("pruning one layer at a time", len(layers)) as advance:
            for layer in layers:
                if layer.name not in known:
                    increase = [value - dense for value in self._of_layer(layer, pruner.score(layer), loss)]
                    entry = {"name": layer.name, "shape": list(layer.shape), "block": str(layer.block)}
                    found.layers.append({**entry, "increase": increase})
                    found.left -= 1
                    found.write(self.file)
                advance(text=layer.name)
        return found

    def _of_layer(self, layer: PrunableLayer, score: Tensor, loss: _Loss) -> list[float]:
        """The loss at each sparsity with this layer alone pruned; its weight is as before afterwards."""
        whole, values = layer.weight.clone(), []
        try:
            for sparsity in self.sparsities:
                mask = allocate({layer.name: score}, [layer], sparsity, "layer")[layer.name]
                layer.weight.copy_(whole.masked_fill(~mask.elements().to(whole.device), 0))
                values.append(loss())
                if not math.isfinite(values[-1]):
                    raise SparsifyError(
                        f"the loss is {values[-1]} without {sparsity:.0%} of layer {layer.name}: leave it out with "
                        f"--ignore, or measure in float32"
                    )
        finally:
            layer.weight.copy_(whole)
        return values

    def _select(self, model: nn.Module) -> list[PrunableLayer]:
        settings = self.pruning
        return selected(model, settings).layers

    def _batches(self, model: nn.Module) -> list[Batch]:
        """The calibration batches, made once: a masked language model hides the same words every time."""
        recipe, spec = self.recipe, self.recipe.data.calibration
        assert spec is not None and recipe.model is not None
        processor = reader.load_processor(recipe.model, recipe.trust_remote_code)
        torch.manual_seed(recipe.seed)
        samples = load_samples(spec, processor, model, self.task, recipe.seed)
        total, size = len(samples.dataset), self.calibrate.batch
        count = min(self.calibrate.samples or total, total)
        rows = [samples.dataset[index * total // count] for index in range(count)]
        made = [
            in_dtype(samples.collate(rows[start : start + size]), model) for start in range(0, count, size)
        ]
        return [{key: value.to(self.device) for key, value in batch.items()} for batch in made]

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the result but the model's weights, which its loss stands for."""
        spec = self.recipe.data.calibration
        assert spec is not None and self.recipe.model is not None
        pruning = self.pruning.model_dump(
            mode="json", include={"method", "options", "block", "targets", "ignore"}
        )
        return {
            "model": Path(self.recipe.model).name,
            "task": self.task,
            **pruning,
            "sparsities": self.sparsities,
            "data": data_files.fingerprint(spec),
            "samples": self.calibrate.samples,
            "batch": self.calibrate.batch,
            "seed": self.recipe.seed,
            "dtype": self.recipe.dtype,
        }

    def _earlier(self, settings: dict[str, Any]) -> Measured | None:
        if self.force or not self.file.exists():
            return None
        found = sensitivity_file.read(self.file)
        differ = sorted(key for key in settings if settings[key] != found.settings.get(key))
        if differ:
            raise ConfigError(
                f"{self.file} was measured with another {' and another '.join(differ)}: name another file with "
                f"--out, or start over with --force"
            )
        return found


class _Loss:
    """The mean loss of a model over fixed batches, each sample weighing the same."""

    def __init__(self, model: nn.Module, batches: list[Batch], task: str | None) -> None:
        self._model, self._batches = model.eval(), batches
        self.batches = len(batches)
        self.unit = EMBEDDING_LOSS if task == "sentence-embedding" else TASK_LOSS
        self._dense: list[Tensor] = []
        if task == "sentence-embedding":
            with torch.no_grad():
                self._dense = [_embeddings(model, batch) for batch in batches]

    def __call__(self, advance: Advance | Callable[[], object] = lambda: None) -> float:
        total, count = 0.0, 0
        for index, batch in enumerate(self._batches):
            size = len(batch["labels"] if "labels" in batch else batch["input_ids"])
            if self._dense:
                loss = 1.0 - F.cosine_similarity(_embeddings(self._model, batch), self._dense[index]).mean()
            else:
                loss = self._model(**batch).loss
            total, count = total + float(loss) * size, count + size
            advance()
        return total / count


def _embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Mean-pooled sentence embeddings `(sentences, hidden)`, float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**inputs).last_hidden_state.float()
    weight = inputs["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * weight).sum(1) / weight.sum(1)
