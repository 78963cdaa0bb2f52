"""Runs that end early, by SIGKILL, SIGTERM, a full disk, a full GPU: they say so, and go on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparsify import pipeline
from sparsify.errors import ConfigError, DeviceMemoryError, OutputError
from sparsify.recipe.schema import Recipe
from sparsify.runtime.output_lock import OutputLock
from sparsify.runtime.progress import Progress
from sparsify.training import finetune
from tests.cli import checkpoints

SEARCH = {"method": "magnitude", "block": "32x32", "sparsity": 0.6, "start": 0.1, "until": 0.7, "every": 2}
STAGES = [
    {
        "stage": "finetune",
        "steps": 14,
        "batch": 4,
        "learning_rate": 2e-3,
        "save_steps": 3,
        "pruner": SEARCH,
        "trainer": {"logging_steps": 4},  # means over steps before and after a checkpoint
    },
    {
        "stage": "finetune",
        "epochs": 1.5,
        "batch": 4,
        "learning_rate": 2e-3,
        "save_steps": 2,
        "heal": "packed",
    },
    {"stage": "convert"},
    {"stage": "report"},
]


def make_recipe(folder: Path, out: str, stages: list[dict[str, Any]] = STAGES) -> Recipe:
    """Searches with magnitude, then heals packed blocks over one and a half epochs; a BERT, so with dropout."""
    return Recipe.from_dict(
        {
            "version": 1,
            "model": str(folder / "dense"),
            "out": str(folder / out),
            "data": {"train": {"path": str(folder / "text.txt"), "length": 24, "samples": 24}},
            "stages": stages,
        }
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    checkpoints.bert_masked(tmp_path / "dense")
    checkpoints.text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What a run writes that nothing breaks."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoints.bert_masked(folder / "dense")
    checkpoints.text(folder)
    pipeline.run(make_recipe(folder, "out"))
    return folder / "out"


class Signal(Progress):
    """Sends this process a signal at a given step of a given task, counted over all tasks of that name."""

    def __init__(self, number: int, task: str, step: int) -> None:
        self.number, self.label, self.left = number, task, step

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Any]:
        def advance(count: float = 1, *, total: float | None = None, text: str = "") -> None:
            if label == self.label and total is None:
                self.left -= int(count)
                if self.left == 0:
                    os.kill(os.getpid(), self.number)

        if label == self.label and self.left == 0:
            os.kill(os.getpid(), self.number)
        yield advance


def curve(folder: Path) -> list[Any]:
    """Every loss that the run has logged, with its step and learning rate."""
    return json.loads((folder / "sparsify_report.json").read_text())["history"]


def killed_at(folder: Path, where: str, step: int) -> int:
    """Resumes the run in a process of its own, which kills itself; returns the signal that ended it."""
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    try:
        torch.manual_seed(os.getpid())  # nothing may depend on what came before
        if where in ("before its last file", "before the old one goes"):
            name = "_save_rng_state" if where.startswith("before its") else "_save_checkpoint"
            kept, calls = getattr(transformers.Trainer, name), [0]

            def save(*args: Any, **options: Any) -> None:
                kept(*args, **options)
                calls[0] += 1
                if calls[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(transformers.Trainer, name, save)
            progress: Progress = Progress()
        else:
            progress = Signal(signal.SIGKILL, where, step)
        pipeline.run(make_recipe(folder, "out"), resume=True, progress=progress)
    finally:
        os._exit(0)


def main(folder: Path) -> None:
    """Kills a run again and again until nothing is left to kill, then lets it end."""
    chosen = random.Random(20)
    places = [
        ("training", chosen.randint(1, 4)),
        ("training", chosen.randint(2, 4)),
        ("before its last file", 1),
        ("before the old one goes", 1),
        ("training", chosen.randint(2, 4)),
        ("packing blocks", 0),
        ("training", chosen.randint(1, 4)),
        ("before the old one goes", 1),
        ("training", 2),
        (f"writing {folder / 'out'}", 0),
    ]
    ends = [killed_at(folder, *place) for place in places]
    print(json.dumps(ends))
    if os.fork() == 0:
        pipeline.run(make_recipe(folder, "out"), resume=True)
        os._exit(0)
    os.wait()
    pipeline.run(make_recipe(folder, "whole"))


@pytest.mark.slow
def test_a_run_killed_at_random_steps_has_the_losses_masks_and_weights_of_an_unbroken_one(place: Path):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(place)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == [signal.SIGKILL] * 10, done.stderr
    # On the CPU without any tolerance: bit for bit.
    assert curve(place / "out") == curve(place / "whole") and len(curve(place / "out")) == 2
    assert checkpoints.digests(place / "out") == checkpoints.digests(place / "whole")
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "text.txt", "whole"]


@pytest.mark.parametrize("step", [5, 17], ids=["searching", "healing"])
def test_sigterm_stops_cleanly_and_the_run_goes_on(place: Path, whole: Path, step: int):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(pipeline.Interrupted, match=r"terminated: finished work is kept .* --resume") as told:
        pipeline.run(make_recipe(place, "out"), progress=Signal(signal.SIGTERM, "training", step))
    assert told.value.exit_code == 143 and "\n" not in str(told.value)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (place / "out").exists() and not (place / "out.lock").exists()
    pipeline.run(make_recipe(place, "out"), resume=True)
    assert curve(place / "out") == curve(whole)
    assert checkpoints.digests(place / "out") == checkpoints.digests(whole)


ERRORS = {
    "the system says so": OSError(errno.ENOSPC, "No space left on device"),
    "torch says so": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing_before_it(
    place: Path, whole: Path, error: str, monkeypatch
):
    save, calls = torch.save, []

    def full(obj: Any, file: Any, *args: Any, **options: Any) -> None:
        calls.append(file)
        if len(calls) > 4:  # in the second checkpoint
            Path(file).write_bytes(b"half a file")
            raise ERRORS[error]
        save(obj, file, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OutputError, match=r"checkpoint-6: .*; make room on its disk and go on with --resume"
    ) as told:
        pipeline.run(make_recipe(place, "out"))
    assert "\n" not in str(told.value)
    kept = [path.name for path in (place / "out.work" / "0-trainer").iterdir()]
    assert kept == ["checkpoint-3"]
    monkeypatch.undo()
    pipeline.run(make_recipe(place, "out"), resume=True)
    assert curve(place / "out") == curve(whole)


def test_a_gpu_that_is_too_small_says_what_to_lower_and_the_run_goes_on_with_that(
    place: Path, whole: Path, monkeypatch
):
    compute, calls = finetune._Trainer.compute_loss, []

    def full(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(self, *args, **options)

    monkeypatch.setattr(finetune._Trainer, "compute_loss", full)
    with pytest.raises(DeviceMemoryError) as told:
        pipeline.run(make_recipe(place, "out"))
    monkeypatch.undo()
    message = str(told.value)
    assert "\n" not in message and message.startswith(
        "the GPU is too small for stage 1 (finetune): take fewer"
    )
    assert (
        "--set stages.0.batch=2 --set stages.0.accumulate=2" in message and "go on with --resume" in message
    )
    smaller = [{**STAGES[0], "batch": 2, "accumulate": 2}, *STAGES[1:]]
    pipeline.run(make_recipe(place, "out", smaller), resume=True)
    steps = [[point["step"] for point in stage["points"]] for stage in curve(place / "out")]
    assert steps == [[point["step"] for point in stage["points"]] for stage in curve(whole)]
    other = [{**STAGES[0], "batch": 2}, *STAGES[1:]]
    with pytest.raises(pipeline.Interrupted):
        pipeline.run(make_recipe(place, "again"), progress=Signal(signal.SIGTERM, "training", 4))
    with pytest.raises(ConfigError, match="left by a run with other settings"):
        pipeline.run(make_recipe(place, "again", other), resume=True)


def test_two_runs_do_not_write_into_one_folder(place: Path):
    out = place / "out"
    with (
        OutputLock(out),
        pytest.raises(OutputError, match=rf"another run \(process {os.getpid()}\) is writing to .*out: wait"),
    ):
        pipeline.run(make_recipe(place, "out"))
    assert not (place / "out.lock").exists()
    (place / "out.lock").write_text("99999")  # of a run that was killed
    pipeline.run(make_recipe(place, "out", [{"stage": "prune", "block": "32x32"}, {"stage": "convert"}]))
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "text.txt"]


def test_a_lock_makes_no_folder_that_stays(tmp_path: Path):
    with OutputLock(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / "out.lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
