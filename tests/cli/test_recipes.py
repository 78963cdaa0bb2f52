"""Every recipe that comes with the package runs, on a small model and few steps, and removes what it was asked to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from sparsify.checkpoint import reader
from sparsify.cli.main import app
from sparsify.layers.swap import sparse_modules
from sparsify.recipe.file import packaged
from sparsify.recipe.schema import FinetuneStage, PruneStage, Recipe
from tests.cli import checkpoints

Maker = Callable[[Path], Path]


class Case(NamedTuple):
    """What stands in for a recipe's model and data, and the blocks that fit the small model."""

    model: Maker = checkpoints.llama
    train: Maker = checkpoints.text
    evaluate: Maker = checkpoints.text
    block: str = "32x32"


CASES = {
    "quickstart": Case(),
    "magnitude_oneshot": Case(),
    "llm_oneshot": Case(),
    "llm_gradual_distill": Case(),
    "llm_group_lasso": Case(checkpoints.bert_masked),
    "llm_lora": Case(),
    "encoder_embedding_distill": Case(checkpoints.bert, checkpoints.sentences, checkpoints.pairs),
    "encoder_classification": Case(checkpoints.bert_classifier, checkpoints.labelled, checkpoints.labelled),
    "seq2seq_translation": Case(checkpoints.t5, checkpoints.targets, checkpoints.targets, "16x16"),
    "vit_classification": Case(checkpoints.vit, checkpoints.pictures, checkpoints.pictures, "16x16"),
    "speech_classification": Case(checkpoints.ast, checkpoints.sounds, checkpoints.sounds, "16x16"),
    "group_lasso_from_scratch": Case(),
    "small_world_from_scratch": Case(),
}


def test_every_recipe_is_listed_described_and_tried() -> None:
    result = CliRunner().invoke(app, ["recipe", "list", "--json"])
    assert {entry["name"] for entry in json.loads(result.stdout)} == set(packaged()) == set(CASES)
    described = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    table = described.partition("## Those that come with the package")[2].partition("##")[0]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_recipe_runs(name: str, tmp_path: Path) -> None:
    if name == "llm_lora":
        pytest.importorskip("peft")
    case = CASES[name]
    recipe = Recipe.load(name)
    makers = {"train": case.train, "calibration": case.train, "eval": case.evaluate}
    settings = []
    for use in (use for use in makers if getattr(recipe.data, use) is not None):
        settings += [f"data.{use}.path={makers[use](tmp_path)}", f"data.{use}.length=24"]
        settings += [f"data.{use}.samples=24"]
    sparsity = 0.0
    for index, stage in enumerate(recipe.stages):
        place = f"stages.{index}"
        if isinstance(stage, FinetuneStage):
            settings += [f"{place}.steps=4", f"{place}.epochs=", f"{place}.batch=4"]
        if stage.stage == "evaluate":
            settings += [f"{place}.latency_tokens=[1, 16]"]
        if stage.stage == "calibrate":
            settings += [f"{place}.samples=8"]
        if isinstance(stage, PruneStage):
            settings += [f"{place}.block={case.block}"] + [f"{place}.reconstruct=2"] * bool(stage.reconstruct)
            sparsity = stage.sparsity
        elif isinstance(stage, FinetuneStage) and stage.pruner is not None:
            settings += [f"{place}.pruner.block={case.block}"]
            sparsity = stage.pruner.sparsity
    command = [
        "run", name, "--model", str(case.model(tmp_path / "dense")), "--out", str(tmp_path / "out"), "--json",
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip

    planned = CliRunner().invoke(app, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["sparsity"] == sparsity and not (tmp_path / "out").exists()

    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert report["recipe"]["name"] == name
    for stage in recipe.stages:
        label = getattr(stage, "label", None)
        assert label is None or ("quality" in report["columns"][label]) == (recipe.data.eval is not None)

    # Removed is what was asked, to half a block of the whole; and what was planned.
    rows, cols = map(int, case.block.split("x"))
    elements = sum(layer["shape"][0] * layer["shape"][1] for layer in plan["layers"])
    assert report["totals"]["layers"] == len(plan["layers"]) > 0
    assert abs(report["totals"]["sparsity"] - sparsity) * elements <= 0.51 * rows * cols
    dense, sparse = ((tmp_path / folder / "model.safetensors").stat().st_size for folder in ("dense", "out"))
    assert sparse < 0.8 * dense and report["totals"]["bytes"] == sparse

    task = None if recipe.task == "auto" else recipe.task
    assert len(sparse_modules(reader.load(tmp_path / "out", task=task))) == len(plan["layers"])
    assert (tmp_path / "out" / "sparsify_recipe.yaml").is_file()
    assert not (tmp_path / "out.work").exists()
