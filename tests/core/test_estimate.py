"""What a dry run says about memory, disk and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsify import estimate as module
from sparsify.cli.main import app
from sparsify.estimate import Estimate, estimate
from sparsify.plan import make_plan
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints

PRUNE = {"stage": "prune", "block": "32x32", "sparsity": 0.75}
TRAIN = {"stage": "finetune", "steps": 10, "batch": 4}


@pytest.fixture
def make(tmp_path: Path):
    dense, text = checkpoints.llama(tmp_path / "dense"), checkpoints.text(tmp_path)

    def make(*stages: Any, samples: int | None = 32) -> Recipe:
        spec = {"path": str(text), "length": 32} | ({"samples": samples} if samples else {})
        return Recipe.from_dict(
            {
                "version": 1,
                "model": str(dense),
                "out": str(tmp_path / "out"),
                "data": {"train": spec, "eval": spec},
                "stages": [{"stage": stage} if isinstance(stage, str) else stage for stage in stages],
            }
        )

    return make


@pytest.fixture
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e9)


def of(recipe: Recipe) -> list[Estimate]:
    return estimate(recipe, make_plan(recipe))


def test_packed_healing_takes_memory_and_time_in_proportion_to_density(make, fixed_rate):
    plan = make_plan(make(PRUNE, TRAIN))
    pruned = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    masked, packed = (of(make(PRUNE, {**TRAIN, "heal": heal}))[1] for heal in ("masked", "packed"))
    # 16 bytes a weight that is not there, and none for the effective weights under a mask.
    assert masked.memory - packed.memory == pytest.approx(0.75 * 16 * pruned + 4 * pruned)
    assert masked.seconds is not None and packed.seconds is not None
    tokens, saved = 10 * 4 * 32, 0.75 * pruned
    assert masked.seconds - packed.seconds == pytest.approx(6 * tokens * saved / (module.REACHED * 1e9))


def test_memory_and_time_follow_the_batch_and_the_steps(make, fixed_rate):
    (small,), (large,) = of(make(TRAIN)), of(make({**TRAIN, "batch": 8}))
    (thrifty,) = of(make({**TRAIN, "batch": 8, "gradient_checkpointing": True}))
    assert large.memory > thrifty.memory > small.memory * 0.9
    assert small.seconds and large.seconds == pytest.approx(2 * small.seconds)


def test_a_time_that_depends_on_the_length_of_data_is_not_made_up(make, fixed_rate):
    epochs = {"stage": "finetune", "epochs": 2}
    (known,) = of(make(epochs))
    assert known.seconds is not None
    (unknown,) = of(make(epochs, samples=None))
    assert unknown.seconds is None and unknown.memory == known.memory


def test_a_dry_run_prints_memory_disk_and_time_and_writes_nothing(make, tmp_path: Path):
    recipe = make("evaluate", PRUNE, {**TRAIN, "heal": "packed"}, "convert", "report")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    before = sorted(tmp_path.iterdir())
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "estimated: memory " in shown.output and ", time " in shown.output and ", disk " in shown.output
    told = CliRunner().invoke(app, ["run", str(file), "--dry-run", "--json"])
    plan = json.loads(told.stdout)
    assert [entry["stage"] for entry in plan["estimates"]] == [stage.stage for stage in recipe.stages]
    assert plan["estimates"][2]["seconds"] > 0
    assert sorted(tmp_path.iterdir()) == before
