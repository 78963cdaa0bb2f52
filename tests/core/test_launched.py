"""`accelerate launch -m sparsify run` on two processes over gloo: one mask, one that writes and prints, one result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparsify import pipeline
from sparsify.cli.main import app
from sparsify.errors import ConfigError
from sparsify.layers.swap import masks_of
from sparsify.recipe.schema import Recipe
from sparsify.runtime import processes
from tests.cli import checkpoints

RANKS = 2
TRAIN = {"stage": "finetune", "steps": 6, "learning_rate": 2e-3, "save_steps": 3}
SEARCH = {"method": "magnitude", "block": "32x32", "sparsity": 0.6, "until": 0.7, "every": 1}

# What accelerate makes of recipes/accelerate/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def make_recipe(folder: Path, out: str, batch: int, *stages: Any) -> dict[str, Any]:
    named = [{"stage": stage} if isinstance(stage, str) else dict(stage) for stage in stages]
    for stage in named:
        if stage["stage"] == "finetune":
            stage["batch"] = batch
    data = {"path": str(folder / "text.txt"), "length": 24, "samples": 48}
    return {
        "version": 1,
        "model": str(folder / "dense"),
        "out": str(folder / out),
        "device": "cpu",
        "data": {"train": data, "eval": data, "calibration": data},
        "stages": named,
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    checkpoints.llama(tmp_path / "dense")
    checkpoints.text(tmp_path)
    return tmp_path


def launch(
    place: Path, recipe: dict[str, Any], *arguments: str, script: str = ""
) -> list[tuple[int, str, str]]:
    """Runs the command on two processes as a launcher starts them; exit code, output and errors of each."""
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).resolve().parents[2])
    common = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(RANKS)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [script] if script else ["-m", "sparsify"]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, "run", str(file), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=place,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=240) for rank in ranks]
        return [(rank.returncode, *said) for rank, said in zip(ranks, told, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()


def test_two_processes_search_and_heal_as_one_run(place: Path):
    stages = [{**TRAIN, "steps": steps} for steps in (3, 1)]
    recipe = make_recipe(place, "out", 2, {**stages[0], "pruner": SEARCH}, {**stages[1], "heal": "packed"})
    told = launch(place, recipe)
    assert [code for code, _, _ in told] == [0, 0], told
    assert told[1][1] == "" and told[1][2] == "", "only the first process speaks"
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "recipe.yaml", "text.txt"]
    masks = masks_of(AutoModelForCausalLM.from_pretrained(place / "out"))
    assert sum(mask.elements_kept for mask in masks.values()) == pytest.approx(
        0.4 * sum(mask.shape[0] * mask.shape[1] for mask in masks.values()), abs=512
    )


@pytest.mark.slow
def test_search_and_packed_healing_under_ddp_give_what_one_process_gives(place: Path):
    stages = (
        "evaluate",
        {**TRAIN, "pruner": SEARCH},
        {**TRAIN, "heal": "packed"},
        "convert",
        "evaluate",
        "report",
    )
    told = launch(place, make_recipe(place, "out", 2, *stages), "--json")
    assert [code for code, _, _ in told] == [0, 0], told
    assert told[1][1] == "" and told[1][2] == "", "only the first process speaks"
    report = json.loads(told[0][1])["report"]
    assert sorted(path.name for path in place.iterdir()) == ["dense", "out", "recipe.yaml", "text.txt"]

    alone = pipeline.run(Recipe.from_dict(make_recipe(place, "alone", 4, *stages)))
    assert alone.report is not None
    models = [AutoModelForCausalLM.from_pretrained(place / name) for name in ("out", "alone")]
    first, second = (masks_of(model) for model in models)
    same = sum(int((mask.keep == second[name].keep).sum()) for name, mask in first.items())
    # Gradients are summed in another order; a close race between two blocks may end otherwise.
    assert same >= 0.97 * sum(mask.keep.numel() for mask in first.values())
    ends = [history["points"][-1]["loss"] for history in report["history"]]
    expected = [history["points"][-1]["loss"] for history in alone.report["history"]]
    assert ends == pytest.approx(expected, rel=0.02)
    assert report["columns"]["recovered"]["quality"]["loss"] == pytest.approx(
        alone.report["columns"]["recovered"]["quality"]["loss"], rel=0.02
    )


@pytest.mark.slow
def test_search_and_masked_healing_under_fsdp2_resume_and_give_what_one_process_gives(
    place: Path, monkeypatch
):
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    stages = ({**TRAIN, "pruner": SEARCH}, {**TRAIN, "heal": "masked"}, "convert", "report")
    recipe = make_recipe(place, "out", 2, *stages)
    monkeypatch.setenv("STOP_AT", "4")
    stopped = launch(place, recipe, script=__file__)
    assert [code for code, _, _ in stopped] == [130, 130] and "with --resume to go on" in stopped[0][2], (
        stopped
    )
    monkeypatch.delenv("STOP_AT")
    told = launch(place, recipe, "--resume", script=__file__)
    assert [code for code, _, _ in told] == [0, 0], told
    assert "going on from step 3" in told[0][2]
    assert [(place / f"sharded-{rank}").read_text() for rank in range(RANKS)] == ["all", "all"]
    for key in FSDP2:
        monkeypatch.delenv(key)
    alone = pipeline.run(Recipe.from_dict(make_recipe(place, "alone", 4, *stages)))
    assert alone.report is not None
    report = json.loads((place / "out" / "sparsify_report.json").read_text())
    first, second = (
        masks_of(AutoModelForCausalLM.from_pretrained(place / name)) for name in ("out", "alone")
    )
    same = sum(int((mask.keep == second[name].keep).sum()) for name, mask in first.items())
    assert same >= 0.97 * sum(mask.keep.numel() for mask in first.values())
    for one, other in zip(report["history"], alone.report["history"], strict=True):
        losses = [[point["loss"] for point in history["points"]] for history in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_packed_healing_under_fsdp2_resumes_and_gives_what_one_process_gives(place: Path, monkeypatch):
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    # Two layers keep one block or none: fewer than there are processes.
    prune = {"stage": "prune", "block": "32x32", "sparsity": 0.5, "scope": "global"}
    stages = (prune, {**TRAIN, "heal": "packed"}, "convert", "report")
    monkeypatch.setenv("STOP_AT", "4")
    stopped = launch(place, make_recipe(place, "out", 2, *stages), script=__file__)
    assert [code for code, _, _ in stopped] == [130, 130], stopped
    monkeypatch.delenv("STOP_AT")
    told = launch(place, make_recipe(place, "out", 2, *stages), "--resume", script=__file__)
    assert [code for code, _, _ in told] == [0, 0], told
    assert "going on from step 3" in told[0][2]
    assert [(place / f"sharded-{rank}").read_text() for rank in range(RANKS)] == ["all", "all"]
    for key in FSDP2:
        monkeypatch.delenv(key)
    alone = pipeline.run(Recipe.from_dict(make_recipe(place, "alone", 4, *stages)))
    assert alone.report is not None
    report = json.loads((place / "out" / "sparsify_report.json").read_text())
    losses = [[point["loss"] for point in every["history"][0]["points"]] for every in (report, alone.report)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    two, one = (AutoModelForCausalLM.from_pretrained(place / name).state_dict() for name in ("out", "alone"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_told(place: Path, monkeypatch):
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    prune = {"stage": "prune", "block": "32x32", "sparsity": 0.5}
    recipe = make_recipe(place, "out", 2, prune, {**TRAIN, "lora": {"rank": 4}})
    told = launch(place, recipe, script=__file__)
    assert [code for code, _, _ in told] == [2, 0], told
    assert "error: low-rank updates cannot be sharded: leave `lora` out" in told[0][2]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("FSDP_VERSION", "1", "FSDP 1 is not supported: set fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading shards buffers"),
    ],
)
def test_launches_that_cannot_shard_are_refused(name: str, value: str, error: str, monkeypatch):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for key, setting in {**FSDP2, **launched, name: value}.items():
        monkeypatch.setenv(key, setting)
    with pytest.raises(ConfigError, match=error):
        processes.join("cpu")


@pytest.mark.slow
def test_calibration_and_one_shot_pruning_reach_all_processes(place: Path):
    prune = {"stage": "prune", "method": "wanda", "block": "32x32", "sparsity": 0.5}
    search = {**TRAIN, "pruner": {**SEARCH, "method": "wanda"}}
    for name, stages in {
        "one-shot": ({"stage": "calibrate", "samples": 8}, prune, {**TRAIN, "heal": "masked"}, "convert"),
        "search": ({"stage": "calibrate", "samples": 8}, search, {**TRAIN, "heal": "auto"}, "convert"),
    }.items():
        told = launch(place, make_recipe(place, name, 2, *stages))
        assert [code for code, _, _ in told] == [0, 0], told
        assert len(masks_of(AutoModelForCausalLM.from_pretrained(place / name))) == 14


@pytest.mark.slow
def test_what_cannot_run_is_told_once_and_ends_all_processes(place: Path):
    recipe = make_recipe(place, "dense", 2, {**TRAIN, "pruner": SEARCH})
    told = launch(place, recipe)
    assert [code for code, _, _ in told] == [2, 0]
    assert told[0][2].count("\n") == 1 and told[0][2].startswith("error: ") and told[1][2] == ""
    recipe = {**make_recipe(place, "out", 2, {**TRAIN, "pruner": SEARCH}), "device": "cuda:1"}
    told = launch(place, recipe)
    assert [code for code, _, _ in told] == [2, 2]
    assert "device cuda:1 is one device, but 2 processes were launched" in told[0][2] and told[1][2] == ""


def test_launch_configurations_come_with_the_package():
    from typer.testing import CliRunner

    for name in ("accelerate/ddp", "accelerate/fsdp2"):
        shown = CliRunner().invoke(app, ["recipe", "show", name])
        assert shown.exit_code == 0, shown.output
        settings = yaml.safe_load(shown.stdout)
        assert settings["num_processes"] == 2 and settings["compute_environment"] == "LOCAL_MACHINE"
    assert settings["fsdp_config"]["fsdp_version"] == 2


def main() -> None:
    """The command with FSDP2 on CPUs, which accelerate grants to GPUs alone: it is told that these are some."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from sparsify.cli.main import main as command
    from sparsify.stages import finetune as stage
    from sparsify.training import finetune
    from sparsify.training.sharding import is_sharded

    made, step_end, fill = PartialState.__init__, finetune._Follow.on_step_end, stage.fill

    def pretend(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.distributed_type = DistributedType.MULTI_GPU

    def stop(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        step_end(self, args, state, control, **options)
        if state.global_step == int(os.environ.get("STOP_AT", "0")):
            raise KeyboardInterrupt

    def watched(whole: Any, sharded: Any, device: Any) -> None:
        every = all(is_sharded(parameter) for parameter in sharded.parameters())
        Path(f"sharded-{os.environ['RANK']}").write_text("all" if every else "not all")
        fill(whole, sharded, device)

    PartialState.__init__, finetune._Follow.on_step_end, stage.fill = pretend, stop, watched
    command(sys.argv[1:])


if __name__ == "__main__":
    main()
