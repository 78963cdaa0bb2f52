"""Quality against measured speed, over block shapes and sparsities: one model pruned anew for each pair.

Each pair is pruned as `sparsify prune` would (calibration, pruning, packing), from the same dense weights; its quality
is measured on held-out data, its speed against the dense model on this machine, in turns, after its outputs have been
compared with those of its dense twin. Calibration samples are read once, and scores are kept (`calibration.cache`):
all sparsities of one block shape share one walk through the dense model.

The weights are pruned in the checkpoint's dtype, and judged and timed in the dtype that was asked for. Rows are kept as
they come, in `sweep.json`: an interrupted sweep goes on where it stopped, and pairs can be added to a finished one.

The best choice is made on the held-out data. So these must not be a test split, nor the calibration data.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsify import measure
from sparsify.bench import model as bench_model
from sparsify.bench.checkpoint import busy
from sparsify.bench.workloads import Task
from sparsify.calibration.cache import WalkCache
from sparsify.checkpoint import reader
from sparsify.errors import ConfigError, SparsifyError
from sparsify.layers.swap import sparse_modules
from sparsify.recipe.schema import Recipe
from sparsify.runtime.interruptions import stoppable
from sparsify.runtime.output_lock import OutputLock
from sparsify.runtime.progress import Progress
from sparsify.stages import State, run_stage
from sparsify.stages.evaluate import Judge, judge
from sparsify.sweep import front
from sparsify.sweep.file import Swept
from sparsify.sweep.plan import SweepPlan

PICTURE, PAGE, SCORES = "sweep.png", "sweep.md", "scores"


class Sweep:
    """One sweep.

    Args:
        plan: What to do.
        progress: Told about every pair.
    """

    def __init__(self, plan: SweepPlan, progress: Progress | None = None) -> None:
        self.plan, self.progress = plan, progress or Progress()

    def run(self) -> Swept:
        """Measures the pairs that the folder does not hold yet, and draws the picture.

        Raises:
            SparsifyError: If outputs of a pruned model are wrong, or a measure of quality is no finite number.
            OutputError: If the folder cannot be written, or another sweep is writing to it.
            KeyboardInterrupt: On Ctrl-C; what was measured before is kept, and the text says so.
        """
        with OutputLock(self.plan.out.resolve()):
            try:
                with stoppable():
                    return self._run()
            except KeyboardInterrupt as error:
                error.args = (
                    f"interrupted: what was measured is kept in {self.plan.file}; run it again to go on",
                )
                raise

    def _run(self) -> Swept:
        plan, begin = self.plan, time.monotonic()
        if plan.found is not None and not plan.missing(plan.found):
            return self._finish(plan.found)
        for note in plan.notes:
            self.progress.note(note)
        source, dense, of = self._load()
        found = self._begin(of(dense, "dense"), dense)
        tasks = [work.on(dense) for work in plan.works]
        calibration, told = None, set()
        for block, sparsity in plan.missing(found):
            if plan.minutes is not None and time.monotonic() - begin > 60 * plan.minutes:
                self.progress.note(f"{plan.minutes:g} minutes are over: run it again to go on")
                break
            state = self._state(source, plan.recipes[block, sparsity], calibration)
            row, calibration = self._row(state, block, sparsity, tasks, of, found)
            found.rows.append(row)
            self._keep(found)
            for note in [*row["notes"], self._said(found)]:
                if note not in told:
                    self.progress.note(note)
                told.add(note)
        for note in busy(plan.device):
            self.progress.note(note)
        return self._finish(found)

    def _said(self, found: Swept) -> str:
        """The last row in a line."""
        row, done = found.rows[-1], len(self.plan.pairs) - found.left
        speed = ", ".join(f"{row['times'][work]['speedup']:.2f}x in {work}" for work in found.works)
        what = f"{row['block']} at {row['sparsity']:.0%}: {found.metric} {found.quality(row):.4g}"
        return f"{done} of {len(self.plan.pairs)}: {what}, {speed}"

    def _keep(self, found: Swept) -> None:
        found.max_loss, found.left = self.plan.max_loss, len(self.plan.missing(found))
        found.write(self.plan.file)

    def _finish(self, found: Swept) -> Swept:
        self._keep(found)
        if found.rows:
            found.draw(self.plan.out / PICTURE)
            found.write_page(self.plan.out / PAGE)
        return found

    def _load(self) -> tuple[Any, Any, Judge]:
        """The dense model as it is pruned, the same as it is timed, and what judges."""
        plan, recipe = self.plan, self.plan.recipe
        with self.progress.task(f"loading {plan.model}"):
            task = None if recipe.task == "auto" else recipe.task
            model = reader.load(plan.model, plan.device, None, task, recipe.trust_remote_code)
            reader.check_weights(model)
        data = (plan.processor, plan.evaluation, plan.task, plan.batch, recipe.seed)
        of = judge(model, *data, self.progress)
        same = self.plan.dtype in (None, model.dtype)
        return model, self._as_run(model if same else copy.deepcopy(model)), of

    def _begin(self, quality: dict[str, float], dense: nn.Module) -> Swept:
        """The sweep so far, or a new one, with the dense model's quality."""
        found = self.plan.found
        if found is None:
            weights = {"quality": quality, "bytes": measure.model_bytes(dense)}
            found = Swept(self.plan.settings, measure.environment(), weights)
        was, now = found.quality(found.dense), quality[found.metric]
        if not abs(now - was) <= 1e-3 * max(abs(was), 1e-3):
            raise ConfigError(
                f"{self.plan.file} was measured on a model whose {found.metric} is {was:.6g}, this one's is {now:.6g}: "
                f"name another folder, or start over with --force"
            )
        self._keep(found)
        return found

    def _state(self, source: Any, recipe: Recipe, calibration: list[Any] | None) -> State:
        return State(
            recipe,
            copy.deepcopy(source),
            self.plan.processor,
            self.plan.task,
            self.plan.device,
            _Silent(self.progress),
            calibration=calibration,
            cache=WalkCache(self.plan.out / SCORES),
        )

    def _row(
        self,
        state: State,
        block: str,
        sparsity: float,
        dense: Sequence[Task],
        of: Judge,
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
        errors = [0.0] * len(self.plan.works)
        if sparse_modules(model):
            errors = bench_model.check(model, bench_model.dense_twin(model), self.plan.works)
        times = {}
        with self.progress.task("timing", len(self.plan.works)) as advance:
            for work, error, task in zip(self.plan.works, errors, dense, strict=True):
                tasks = {"dense": task, "sparse": work.on(model)}
                rows = bench_model.timed(
                    {"error": error}, tasks, self.plan.device, self.plan.repeats, eager=False
                )
                times[str(work)] = rows[0]
                advance()
        return times

    def _as_run(self, model: Any) -> Any:
        """The model in the dtype that it is judged and timed in; buffers, such as positions, stay as they are."""
        if self.plan.dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.plan.dtype)
        return model.eval()


class _Silent(Progress):
    """Tasks go on to a progress, notes do not: a sweep tells each once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, label: str, total: float | None = None) -> Any:
        """As the progress does."""
        return self._progress.task(label, total)
