"""Quality against measured speed, over block shapes and sparsities: one model pruned anew for each pair.

Each pair is pruned as `sparsify prune` would (calibration, pruning, packing), from the same dense weights; its quality
is measured on held-out data, its speed against the dense model on this machine, in turns, after its outputs have been
compared with those of its dense twin. Calibration samples are read once, and scores are kept (`sparsify.walk_cache`):
all sparsities of one block shape share one walk through the dense model.

The weights are pruned in the checkpoint's dtype, and judged and timed in the dtype that was asked for. Rows are kept as
they come, in `sweep.json`: an interrupted sweep goes on where it stopped, and pairs can be added to a finished one.

The best choice is made on the held-out data. So these must not be a test split, nor the calibration data.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import data as data_files
from sparsify import front, measure, sweep_file
from sparsify.bench import model as bench_model
from sparsify.bench.workloads import Task, positive, sample_inputs, workloads
from sparsify.blocks import BlockShape
from sparsify.checkpoint import reader
from sparsify.errors import ConfigError, OutputError, SparsifyError
from sparsify.interruptions import stoppable
from sparsify.kernels.tuning_files import device_name
from sparsify.layers.swap import sparse_modules
from sparsify.output_lock import OutputLock
from sparsify.plan import resolve_device, resolve_task, skeleton
from sparsify.progress import Progress
from sparsify.pruner import default_method
from sparsify.recipe import Recipe
from sparsify.stages import State, run_stage
from sparsify.stages.evaluate import judge
from sparsify.sweep_file import Swept
from sparsify.targets import select
from sparsify.walk_cache import WalkCache

BLOCKS, SPARSITIES = ("16x16", "32x32", "64x64", "128x128", "128x16"), (0.5, 0.75, 0.9)
FILE, PICTURE, SCORES = "sweep.json", "sweep.png", "scores"
DTYPES = ("auto", "float32", "float16", "bfloat16")

Pair = tuple[str, float]


class Sweep:
    """One sweep.

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
        max_loss: For the best choice; see `sparsify.front.best`.
        minutes: Begin no pair after this time.
        force: Start over.
        dtype: What the models are judged and timed in: `auto` (the checkpoint's), `float32`, `float16`, `bfloat16`.
        progress: Told about every pair.
        **values: Top-level keys of a recipe: `device`, `task`, `seed`, `trust_remote_code`.

    Raises:
        ConfigError: If an argument is wrong, the held-out data are a test split or those of the calibration, or the
            folder holds a sweep with other settings.
        CheckpointError: If the checkpoint is missing or damaged.
        TargetError: If a pattern matches nothing, or nothing can be pruned.
        DataError: If data are missing.
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
        progress: Progress | None = None,
        **values: Any,
    ) -> None:
        self.model, self.evaluation, self.progress = model, evaluation, progress or Progress()
        self.out = Path(out).expanduser()
        self.file = self.out / FILE
        self.tokens, self.batches = positive("tokens", tokens), positive("batches", batches)
        self.repeats, self.batch, self.max_loss, self.minutes = repeats, batch, max_loss, minutes
        self.force = force
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
        self.works, notes = workloads(
            empty, self.task, self.tokens, self.batches, sample_inputs(self.processor, self.task)
        )
        if not self.works:
            raise ConfigError(f"there is no speed to measure: {notes[0]}")
        for note in notes:
            self.progress.note(note)
        self.settings = self._settings(self.dtype or next(empty.parameters()).dtype)
        self.found = self._earlier()

    @property
    def left(self) -> list[Pair]:
        """The pairs still to be measured, in order."""
        known = {(row["block"], row["sparsity"]) for row in self.found.rows} if self.found else set()
        return [pair for pair in self.pairs if pair not in known]

    def run(self) -> Swept:
        """Measures the pairs that the folder does not hold yet, and draws the picture.

        Raises:
            SparsifyError: If outputs of a pruned model are wrong, or a measure of quality is no finite number.
            OutputError: If the folder cannot be written, or another sweep is writing to it.
            KeyboardInterrupt: On Ctrl-C; what was measured before is kept, and the text says so.
        """
        with OutputLock(self.out.resolve()):
            try:
                with stoppable():
                    return self._run()
            except KeyboardInterrupt as error:
                error.args = (
                    f"interrupted: what was measured is kept in {self.file}; run it again to go on",
                )
                raise

    def _run(self) -> Swept:
        begin, left = time.monotonic(), self.left
        if self.found is not None and not left:
            self._finish(self.found)
            return self.found
        source, dense, of = self._load()
        found = self._begin(of(dense, "dense"), dense)
        tasks = [work.on(dense) for work in self.works]
        calibration, told = None, set()
        for block, sparsity in left:
            if self.minutes is not None and time.monotonic() - begin > 60 * self.minutes:
                self.progress.note(f"{self.minutes:g} minutes are over: run it again to go on")
                break
            state = self._state(source, self.recipes[block, sparsity], calibration)
            row, calibration = self._row(state, block, sparsity, tasks, of, found)
            found.rows.append(row)
            found.left -= 1
            found.write(self.file)
            for note in [*row["notes"], self._said(found)]:
                if note not in told:
                    self.progress.note(note)
                told.add(note)
        self._finish(found)
        return found

    def _said(self, found: Swept) -> str:
        """The last row in a line."""
        row, done = found.rows[-1], len(self.pairs) - found.left
        speed = ", ".join(f"{row['times'][work]['speedup']:.2f}x in {work}" for work in found.works)
        what = f"{row['block']} at {row['sparsity']:.0%}: {found.metric} {found.quality(row):.4g}"
        return f"{done} of {len(self.pairs)}: {what}, {speed}"

    def _finish(self, found: Swept) -> None:
        found.max_loss, found.left = self.max_loss, len(self.left)
        found.write(self.file)
        if found.rows:
            found.draw(self.out / PICTURE)

    def _load(self) -> tuple[Any, Any, Callable[[nn.Module, str], dict[str, float]]]:
        """The dense model as it is pruned, the same as it is timed, and what judges."""
        recipe = self.recipe
        with self.progress.task(f"loading {self.model}"):
            task = None if recipe.task == "auto" else recipe.task
            model = reader.load(self.model, self.device, None, task, recipe.trust_remote_code)
            reader.check_weights(model)
        of = judge(model, self.processor, self.evaluation, self.task, self.batch, recipe.seed, self.progress)
        same = self.dtype in (None, model.dtype)
        return model, self._as_run(model if same else copy.deepcopy(model)), of

    def _begin(self, quality: dict[str, float], dense: nn.Module) -> Swept:
        """The sweep so far, or a new one, with the dense model's quality."""
        if self.found is None:
            weights = {"quality": quality, "bytes": measure.model_bytes(dense)}
            self.found = Swept(self.settings, measure.environment(), weights, self.max_loss)
        was, now = self.found.quality(self.found.dense), quality[self.found.metric]
        if not abs(now - was) <= 1e-3 * max(abs(was), 1e-3):
            raise ConfigError(
                f"{self.file} was measured on a model whose {self.found.metric} is {was:.6g}, this one's is {now:.6g}: "
                f"name another folder, or start over with --force"
            )
        self.found.left = len(self.left)
        self.found.max_loss = self.max_loss
        self.found.write(self.file)
        return self.found

    def _state(self, source: Any, recipe: Recipe, calibration: list[Any] | None) -> State:
        return State(
            recipe,
            copy.deepcopy(source),
            self.processor,
            self.task,
            self.device,
            _Silent(self.progress),
            calibration=calibration,
            cache=WalkCache(self.out / SCORES),
        )

    def _row(
        self,
        state: State,
        block: str,
        sparsity: float,
        dense: Sequence[Task],
        of: Callable[[nn.Module, str], dict[str, float]],
        found: Swept,
    ) -> tuple[dict[str, Any], list[Any] | None]:
        """Prunes and measures one pair; also gives the calibration samples, for the next one."""
        begin = time.perf_counter()
        calibration = state.calibration
        for index, stage in enumerate(state.recipe.stages):
            if stage.stage == "report" or (stage.stage == "calibrate" and calibration is not None):
                continue
            state.index = index
            torch.manual_seed(state.recipe.seed + index)
            run_stage(stage, state)
            calibration = calibration or state.calibration
        seconds = time.perf_counter() - begin
        model = self._as_run(state.model)
        label = f"{block}, {sparsity:.0%}"
        quality = of(model, label)
        value = quality[found.metric]
        if not abs(value) < float("inf"):
            raise SparsifyError(
                f"the {found.metric} is {value} with {label} removed: leave this pair out, or use --dtype float32"
            )
        elements = sum(mask.shape[0] * mask.shape[1] for mask in state.masks.values())
        kept = sum(mask.elements_kept for mask in state.masks.values())
        row = {
            "block": block,
            "sparsity": sparsity,
            "removed": 1 - kept / elements,
            "quality": quality,
            "loss": front.trade(1.0, found.metric, value, found.quality(found.dense)).loss,
            "bytes": measure.model_bytes(model),
            "times": self._times(model, dense),
            "kept_dense": len(state.slower),
            "notes": state.notes,
            "seconds": round(seconds, 2),
        }
        return row, calibration

    def _times(self, model: Any, dense: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """Speed in each workload, beside the dense model's in turns; only of a model whose outputs are right."""
        errors = [0.0] * len(self.works)
        if sparse_modules(model):
            errors = bench_model.check(model, bench_model.dense_twin(model), self.works)
        times = {}
        with self.progress.task("timing", len(self.works)) as advance:
            for work, error, task in zip(self.works, errors, dense, strict=True):
                tasks = {"dense": task, "sparse": work.on(model)}
                rows = bench_model.timed({"error": error}, tasks, self.device, self.repeats, eager=False)
                times[str(work)] = rows[0]
                advance()
        return times

    def _as_run(self, model: Any) -> Any:
        """The model in the dtype that it is judged and timed in; buffers, such as positions, stay as they are."""
        if self.dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        return model.eval()

    def _settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """Everything that decides a row but its block shape and sparsity, and the weights, which the dense quality
        stands for.
        """
        recipe, calibration = self.recipe, self.recipe.data.calibration
        stages = [
            stage.model_dump(mode="json", exclude={"block", "sparsity", "batch"})
            for stage in recipe.stages
            if stage.stage != "report"
        ]
        return {
            "model": Path(self.model).name,
            "task": self.task,
            "stages": stages,
            "calibration": None if calibration is None else data_files.fingerprint(calibration),
            "evaluation": data_files.fingerprint(self.evaluation),
            "evaluated_on": _name(self.evaluation),
            "seed": recipe.seed,
            "device": device_name(self.device),
            "dtype": str(dtype).removeprefix("torch."),
            "workloads": [str(work) for work in self.works],
        }

    def _earlier(self) -> Swept | None:
        """The sweep that the folder holds, if it is to go on."""
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, expected a folder")
        if self.force or not self.file.exists():
            return None
        found = sweep_file.read(self.file)
        differ = sorted(key for key in self.settings if self.settings[key] != found.settings.get(key))
        if differ:
            raise ConfigError(
                f"{self.file} was measured with another {' and another '.join(differ)}: name another folder with "
                f"--out, or start over with --force"
            )
        return found


class _Silent(Progress):
    """Tasks go on to a progress, notes do not: a sweep tells each once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, label: str, total: float | None = None) -> Any:
        """As the progress does."""
        return self._progress.task(label, total)


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
    if calibration is None or evaluation.path is None or calibration.path is None:
        return
    if Path(evaluation.path).resolve() == Path(calibration.path).resolve():
        raise ConfigError(
            f"--eval and --data are both {evaluation.path}: give held-out data, that calibration does not see"
        )


def _name(spec: Any) -> str:
    """Data in words: a file's name, or a data set's with its split."""
    if spec.path is not None:
        return Path(spec.path).name
    return ":".join(part for part in (spec.name, spec.config, spec.split) if part)
