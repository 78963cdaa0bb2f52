"""Every task from its own data: a dense model is pruned, trained and measured, and learns something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsify import pipeline
from sparsify.recipe import Recipe
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
