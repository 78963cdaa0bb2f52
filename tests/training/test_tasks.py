"""Every task from its own data: a dense model is pruned, trained and measured, and learns something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsify import pipeline
from sparsify.api import evaluate
from sparsify.cli.main import app
from sparsify.data.spec import DataSpec
from sparsify.errors import ConfigError
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints

CASES = {
    "seq2seq": (checkpoints.t5, checkpoints.targets, "seq2seq", "perplexity"),
    "image": (checkpoints.vit, checkpoints.pictures, "image-classification", "accuracy"),
    "spectrogram": (checkpoints.ast, checkpoints.sounds, "speech-classification", "accuracy"),
    "wave": (checkpoints.wav2vec2, checkpoints.sounds, "speech-classification", "accuracy"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_pruned_trained_and_measured(name: str, tmp_path: Path) -> None:
    make, make_data, task, measure = CASES[name]
    spec = {"path": str(make_data(tmp_path)), "length": 32}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "model": str(make(tmp_path / "dense")),
            "out": str(tmp_path / "out"),
            "data": {"train": spec, "eval": spec, "calibration": spec},
            "stages": [
                {"stage": "evaluate", "label": "dense"},
                {"stage": "calibrate", "samples": 16},
                {"stage": "prune", "block": "16x16", "sparsity": 0.5, "method": "wanda"},
                {"stage": "finetune", "steps": 30, "batch": 8, "learning_rate": 3e-3},
                {"stage": "convert"},
                {"stage": "evaluate", "label": "sparse", "latency_batches": [1, 2]},
                {"stage": "report"},
            ],
        }
    )
    pipeline.run(recipe)
    report = json.loads((tmp_path / "out" / "sparsify_report.json").read_text())
    assert report["task"] == task
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    dense, sparse = (report["columns"][label] for label in ("dense", "sparse"))
    if measure == "accuracy":
        assert sparse["quality"]["accuracy"] == 100.0
        assert sparse["quality"]["samples"] == (24 if name == "image" else 16)
    else:
        assert sparse["quality"]["perplexity"] < 0.5 * dense["quality"]["perplexity"]
    assert sparse["peak_memory"] > 0 and sparse["latency"] and sparse["latency_batches"]["2"]


@pytest.mark.parametrize("name", ["image", "wave"])
def test_a_model_of_lower_precision_is_calibrated_trained_and_measured(name: str, tmp_path: Path) -> None:
    make, make_data, task, _ = CASES[name]
    spec = {"path": str(make_data(tmp_path))}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "model": str(make(tmp_path / "dense")),
            "out": str(tmp_path / "out"),
            "dtype": "bfloat16",
            "data": {"train": spec, "eval": spec, "calibration": spec},
            "stages": [
                {"stage": "calibrate", "samples": 8},
                {"stage": "prune", "block": "16x16", "sparsity": 0.5, "method": "wanda"},
                {"stage": "finetune", "steps": 2, "batch": 8, "distill": {"teacher_dtype": "bfloat16"}},
                {"stage": "evaluate"},
                {"stage": "report"},
            ],
        }
    )
    report = pipeline.run(recipe).report
    assert report is not None and report["task"] == task
    assert "accuracy" in report["columns"]["recovered"]["quality"]


def test_eval_measures_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = checkpoints.pictures(tmp_path)
    arguments = ["eval", str(checkpoints.vit(tmp_path / "dense")), "--data", str(folder), "--json"]
    (column,) = json.loads(CliRunner().invoke(app, arguments).stdout)["columns"].values()
    assert column["quality"]["samples"] == 24
    assert list(column["latency"]) == ["17"]  # 16 patches and the class token


def test_a_checkpoint_without_a_processor_is_told(tmp_path: Path) -> None:
    dense = checkpoints.vit(tmp_path / "dense")
    (dense / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="no image processor, which image-classification data needs"):
        evaluate(dense, DataSpec(path=checkpoints.pictures(tmp_path)))
