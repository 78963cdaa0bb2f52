"""Every recipe that comes with the package runs, on a small model and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.recipe import Recipe
from sparsify.recipe_file import packaged
from tests.cli import checkpoints

# What stands in for the model, and for the data, of each recipe; one without an entry gets the language model.
SENTENCES = {"sentence_encoder": (checkpoints.bert, checkpoints.pairs)}


@pytest.mark.parametrize("name", packaged())
def test_recipe_runs(name: str, tmp_path: Path) -> None:
    make_model, make_data = SENTENCES.get(name, (checkpoints.llama, checkpoints.text))
    data = str(make_data(tmp_path))
    recipe = Recipe.load(name)
    settings = [f"data.{use}.path={data}" for use in ("train", "eval") if getattr(recipe.data, use)]
    settings += [f"data.{use}.length=24" for use in ("train", "eval") if getattr(recipe.data, use)]
    for index, stage in enumerate(recipe.stages):
        if stage.stage == "finetune":
            settings += [f"stages.{index}.steps=2", f"stages.{index}.epochs=", f"stages.{index}.batch=4"]
        if stage.stage == "evaluate":
            settings += [f"stages.{index}.latency_tokens=[1, 16]"]
        for place, pruning in (
            (f"stages.{index}", stage),
            (f"stages.{index}.pruner", getattr(stage, "pruner", None)),
        ):
            if hasattr(pruning, "block"):
                settings += [f"{place}.block=32x32"]
    command = [
        "run",
        name,
        "--model",
        str(make_model(tmp_path / "dense")),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    result = CliRunner().invoke(
        app, [*command, *(part for setting in settings for part in ("--set", setting))]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert report["recipe"]["name"] == name
    assert report["totals"]["layers"] > 0
    dense, sparse = ((tmp_path / folder / "model.safetensors").stat().st_size for folder in ("dense", "out"))
    assert sparse < 0.8 * dense and report["totals"]["bytes"] == sparse
    for stage in recipe.stages:
        assert getattr(stage, "label", None) is None or stage.label in report["columns"]
