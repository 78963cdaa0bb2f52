"""Running a recipe: checks first, then the stages in order, then one checkpoint, whole or not at all.

What finished stages left is kept in a work folder beside the output (see `sparsify.runtime.workfolder`), so that an
interrupted run goes on after the last finished stage, and in the middle of a `finetune` stage from the Trainer's last
checkpoint. Every stage starts from its own seed, so a resumed run writes the same bytes as an unbroken one.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify import measure
from sparsify.blocks import BlockMask
from sparsify.calibration.cache import WalkCache
from sparsify.checkpoint import reader, scratch, writer
from sparsify.checkpoint.format import REPORT_FILE
from sparsify.data.spec import classes
from sparsify.errors import OutputError, SparsifyError
from sparsify.layers.swap import masks_of
from sparsify.plan import Plan, make_plan, needs_head, resolve_device, resolve_task, skeleton, writes
from sparsify.recipe.schema import Recipe
from sparsify.runtime import processes
from sparsify.runtime.interruptions import Interrupted, Terminated, memory_told, stoppable
from sparsify.runtime.output_lock import OutputLock
from sparsify.runtime.progress import Progress
from sparsify.runtime.workfolder import WorkFolder, last_trainer_checkpoint, replace_text
from sparsify.stages import State, run_stage
from sparsify.stages.convert import pack
from sparsify.stages.prune import restore_masks
from sparsify.stages.report_page import render
from sparsify.stages.sharing import share
from sparsify.targets import KeptDense

# Recipes without these stages are over so soon that a work folder would cost more than it saves.
LONG_STAGES = {"calibrate", "finetune", "evaluate"}
# Beside the output: scores of pruners that need calibration data (see `sparsify.calibration.sequential`).
SCORES_FOLDER = "sparsify-scores"


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        out: The checkpoint's folder; `None` if the recipe writes none.
        report: The report (see `sparsify.stages.report.build`); `None` without a `report` stage.
        model: The model as it was saved, in memory.
        processor: Its tokenizer or image processor, if it has one.
    """

    out: Path | None
    report: dict[str, Any] | None
    model: Any
    processor: Any

    def __str__(self) -> str:
        from sparsify.stages.report import as_text

        lines = [as_text(self.report["columns"])] if self.report and self.report["columns"] else []
        return "\n".join([*lines, f"written to {self.out}" if self.out else "nothing was written"])


def run(
    recipe: Recipe, *, force: bool = False, resume: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs a recipe to the end.

    Args:
        recipe: The recipe, with `model` and `out` set.
        force: Replace an existing checkpoint in `out`, and drop what an interrupted run left.
        resume: Go on where an interrupted run of the same recipe stopped.
        progress: Told about every stage.

    Raises:
        SparsifyError: A child of it for whatever the user can put right; see `make_plan`. Nothing is written then.
        Interrupted: On Ctrl-C; `out` is untouched.
    """
    recipe = recipe.model_copy(update={"device": processes.join(recipe.device)})
    progress = progress if progress is not None and processes.is_first() else Progress()
    with ExitStack() as stack:
        plan, work = processes.first_alone(lambda: _ready(recipe, force, resume, progress, stack)) or (
            _plan_of_others(recipe),
            _folder(recipe),
        )
        return _run(recipe, plan, work, force, progress)


def _ready(
    recipe: Recipe, force: bool, resume: bool, progress: Progress, stack: ExitStack
) -> tuple[Plan, WorkFolder | None]:
    """Checks everything, and takes hold of the output folder."""
    plan = make_plan(recipe, force=force)
    if recipe.out is not None and writes(recipe):
        stack.enter_context(OutputLock(Path(recipe.out).expanduser().resolve()))
    work = _work_folder(recipe, force, resume)
    if work is not None and resume and not work.exists:
        progress.note("nothing to resume: starting from the beginning")
    return plan, work


def _plan_of_others(recipe: Recipe) -> Plan:
    """What a process needs to know that leaves checks, notes and writing to the first one."""
    assert recipe.model is not None
    model = skeleton(recipe)
    task = resolve_task(recipe.task, recipe.model, type(model).__name__)
    head = needs_head(recipe, model, task)
    return Plan(recipe.model, type(model).__name__, task, None, [], new_head=head)


def _run(recipe: Recipe, plan: Plan, work: WorkFolder | None, force: bool, progress: Progress) -> RunResult:
    started: _Run | None = None
    try:
        with stoppable():
            started = _Run(recipe, plan, work, progress)
            return started.run(force)
    except KeyboardInterrupt as error:
        kind = Terminated if isinstance(error, Terminated) else Interrupted
        raise kind(_how_to_go_on(work, "terminated" if kind is Terminated else "interrupted")) from None
    except SparsifyError:
        if work is not None and started is not None and not started.lasting and processes.is_first():
            work.remove()
        raise
    finally:
        if work is not None and not work.exists and processes.is_first():
            work.remove()


def _folder(recipe: Recipe) -> WorkFolder | None:
    """The work folder of a recipe that needs one."""
    short = LONG_STAGES.isdisjoint(stage.stage for stage in recipe.stages)
    if recipe.out is None or not writes(recipe) or short:
        return None
    return WorkFolder(Path(recipe.out).expanduser().resolve(), recipe)


def _work_folder(recipe: Recipe, force: bool, resume: bool) -> WorkFolder | None:
    work = _folder(recipe)
    if work is None:
        return None
    if work.exists and not resume and not force:
        raise OutputError(
            f"{work.path} is left from an interrupted run: go on with --resume, or start over with --force"
        )
    if not (resume and work.exists):
        work.remove()
    return work


def _how_to_go_on(work: WorkFolder | None, what: str) -> str:
    if work is None:
        return f"{what}: nothing was written"
    if not work.exists:
        return f"{what} before the first stage had finished: nothing was written"
    return f"{what}: finished work is kept in {work.path}; run the same command with --resume to go on"


class _Run:
    """One run: its state, and what of it is on the disk."""

    def __init__(self, recipe: Recipe, plan: Plan, work: WorkFolder | None, progress: Progress) -> None:
        self.recipe, self.plan, self.work, self.progress = recipe, plan, work, progress
        self.saved: dict[str, Any] = work.read() if work is not None else {}
        self.finished: int = self.saved.get("finished", 0)
        # Statistics are not stored, nor is the report, which is put together from the rest: both are made again.
        while self.finished and recipe.stages[self.finished - 1].stage in ("calibrate", "report"):
            self.finished -= 1
        self.state = self._start()
        processes.meet()  # nobody reads the work folder any more, which the first process is about to change

    @property
    def lasting(self) -> bool:
        """Whether a run that goes on from here is spared anything; calibration is repeated."""
        done = self.recipe.stages[: self.finished]
        return any(stage.stage != "calibrate" for stage in done) or bool(self.saved.get("trainer"))

    def run(self, force: bool) -> RunResult:
        """The stages that are not finished yet, then the output."""
        state, stages = self.state, self.recipe.stages
        for line in self.plan.notes if not self.saved else ():
            state.note(line)
        for index in range(self.finished, len(stages)):
            stage = stages[index]
            state.index = index
            self._prepare_training(index)
            torch.manual_seed(self.recipe.seed + index)
            self.progress.stage(index, len(stages), stage.stage)
            kept = (
                "finished work is kept: then go on with --resume"
                if self.work is not None
                else "nothing is kept"
            )
            with memory_told(stage, index, kept):
                self._stage(stage)
            self.finished = index + 1
            self._keep()
        out = processes.first_alone(lambda: self._write(force) if writes(self.recipe) else None)
        if self.work is not None and processes.is_first():
            self.work.remove()
        return RunResult(out, state.report, state.model, state.processor)

    def _stage(self, stage: Any) -> None:
        """One stage: all processes train together, the first one does everything else."""
        if stage.stage == "finetune":
            run_stage(stage, self.state)
        else:
            processes.first_alone(lambda: run_stage(stage, self.state))
            share(self.state)

    def _start(self) -> State:
        """The state before the first stage to run, from the source or from what an earlier run left."""
        recipe, saved = self.recipe, self.saved
        assert recipe.model is not None
        device = resolve_device(recipe.device)
        source = (
            str(self.work.path / saved["weights"]) if self.work and saved.get("weights") else recipe.model
        )
        dtype = None if recipe.dtype == "auto" else recipe.dtype
        task = None if recipe.task == "auto" else recipe.task
        with self.progress.task(f"loading {recipe.model}"):
            # A new head is random until a stage trains it; without such a stage nothing would.
            complete = not any(stage.stage == "finetune" for stage in recipe.stages)
            home = torch.device("cpu") if recipe.offload else device
            drawn = recipe.from_scratch and source == recipe.model
            trust, labels = recipe.trust_remote_code, None
            if self.plan.new_head and source == recipe.model:
                assert recipe.data.train is not None and self.plan.task is not None
                labels = classes(recipe.data.train, self.plan.task)
            if drawn:
                model = scratch.draw(source, home, dtype, task, trust, recipe.seed, labels)
            else:
                torch.manual_seed(recipe.seed)  # of a head that the checkpoint lacks
                model = reader.load(source, home, dtype, task, trust, complete, labels)
            reader.check_weights(model)
            processor = reader.load_processor(recipe.model, recipe.trust_remote_code)
        state = State(
            recipe, model, processor, self.plan.task, device, self.progress, keep=self._keep_before_training
        )
        state.changed = drawn
        if recipe.out is not None:
            # Beside the output, and not in it, so that another run finds it.
            state.cache = WalkCache(Path(recipe.out).expanduser().resolve().with_name(SCORES_FOLDER))
        for key in ("columns", "history", "notes", "choices", "trained", "slower", "permuted"):
            if key in saved:
                setattr(state, key, saved[key])
        state.kept_dense = [
            KeptDense(e["name"], tuple(e["shape"]), e["reason"]) for e in saved.get("kept_dense", [])
        ]
        # The source is block-sparse already, or an earlier run packed it.
        state.masks = {
            name: BlockMask(mask.keep.cpu(), mask.shape, mask.block) for name, mask in masks_of(model).items()
        }
        if self.work and saved.get("masks"):
            state.masks = self.work.read_masks(saved["masks"])
            restore_masks(model, state.masks)
            if saved["packed"]:
                pack(state)
        return state

    def _prepare_training(self, index: int) -> None:
        if self.recipe.stages[index].stage != "finetune" or self.work is None:
            return
        dense = self.recipe.taught_by(index)
        self.state.teacher = None if dense is None else self.work.path / f"{dense + 1}-weights"
        self.state.trainer_folder = self.work.trainer_folder(self.state.index)
        self.state.resume = last_trainer_checkpoint(self.state.trainer_folder)
        if self.state.resume is not None:
            step = self.state.resume.name.removeprefix("checkpoint-")
            self.progress.note(f"going on from step {step} of the finetune stage")

    def _keep_before_training(self) -> None:
        self._keep(training=True)

    def _keep(self, training: bool = False) -> None:
        """Stores the state after the last finished stage, or in a stage that is about to train."""
        if self.work is None or not processes.is_first():
            return
        state, label = self.state, f"{self.finished}{'t' if training else ''}"
        weights, masks = self.saved.get("weights"), self.saved.get("masks")
        if state.changed:
            weights = f"{label}-weights"
            self.work.create()
            # With its tokenizer it is a whole checkpoint, which may be a teacher later.
            writer.save(state.model, self.work.path / weights, processor=state.processor, force=True)
            state.changed = False
        if state.masks:
            masks = f"{label}-masks.safetensors"
            self.work.write_masks(masks, state.masks)
        self.saved = {
            "finished": self.finished,
            "weights": weights,
            "masks": masks,
            "packed": state.packed,
            "trainer": self.work.trainer_folder(state.index).name if training else None,
            "teachers": [f"{dense + 1}-weights" for dense in self._teachers()],
            "columns": state.columns,
            "history": state.history,
            "notes": state.notes,
            "choices": state.choices,
            "trained": state.trained,
            "kept_dense": [asdict(kept) for kept in state.kept_dense],
            "slower": state.slower,
            "permuted": state.permuted,
        }
        self.work.write(self.saved)

    def _teachers(self) -> set[int]:
        """The finished stages whose results teach stages to come."""
        later = range(self.finished, len(self.recipe.stages))
        taught = (self.recipe.taught_by(index) for index in later)
        return {dense for dense in taught if dense is not None and dense < self.finished}

    def _write(self, force: bool) -> Path:
        """Writes the checkpoint with recipe and report, then puts the files' real sizes into the report."""
        state, recipe = self.state, self.recipe
        assert recipe.out is not None
        with self.progress.task(f"writing {recipe.out}"):
            out = writer.save(
                state.model,
                recipe.out,
                processor=state.processor,
                recipe=recipe.to_yaml(),
                report=state.report,
                page=render(state.report, state.masks) if state.report is not None else None,
                force=force,
            )
        if state.report is not None:
            state.report["out"] = str(recipe.out)
            state.report["totals"]["bytes"] = measure.bytes_on_disk(out)
            replace_text(out / REPORT_FILE, json.dumps(state.report, indent=2) + "\n")
        return out
