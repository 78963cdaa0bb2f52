"""Scopes that give layers their own densities, through the interfaces that a user sees."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify import pipeline
from sparsify.checkpoint.reader import open_checkpoint
from sparsify.cli.main import app
from sparsify.errors import ConfigError
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Llama with outliers in its second block."""
    folder = checkpoints.llama(tmp_path_factory.mktemp("dense") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if name.endswith("proj.weight"):
                parameter[:, ::16] *= 8
    model.save_pretrained(folder)
    return folder


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(5, 100, (2, 24))} for _ in range(2)]


def mean_density(density: dict[str, float], block: int) -> float:
    return sum(d for name, d in density.items() if f"layers.{block}." in name) / 7


@pytest.mark.parametrize("method", ["magnitude", "wanda", "block_obs"])
def test_outliers_are_seen_whatever_the_pruner(dense, method):
    model = AutoModelForCausalLM.from_pretrained(dense)
    result = sparsify.prune(model, method=method, block=16, scope="outlier", calibration=batches())
    assert mean_density(result.density, 0) == pytest.approx(0.42, abs=0.02)
    assert mean_density(result.density, 1) == pytest.approx(0.58, abs=0.02)
    assert result.sparsity == pytest.approx(0.5, abs=0.001)


def test_outliers_need_calibration(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    with pytest.raises(
        ConfigError, match=r"scope 'outlier' needs the statistic 'input_sq' of layer .*: put a cal"
    ):
        sparsify.prune(model, block=16, scope="outlier")


def test_outliers_from_the_command_line(dense, tmp_path):
    data, out = checkpoints.text(tmp_path), tmp_path / "out"
    command = ["prune", dense, "--out", out, "--block", "16x16", "--scope", "outlier", "--data", data]
    command += ["--length", "32", "--samples", "64", "--dense-where-slower", "never"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    density = {layer.name: layer.density for layer in open_checkpoint(out).layers}
    assert mean_density(density, 1) - mean_density(density, 0) == pytest.approx(0.16, abs=0.03)


@pytest.mark.parametrize("scope", ["outlier", "erdos_renyi"])
def test_a_search_keeps_to_the_densities_of_its_scope(dense, tmp_path, scope):
    source = {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}
    pruner = {"method": "group_lasso", "block": "16x16", "sparsity": 0.5, "scope": scope}
    stages = [
        {"stage": "calibrate", "samples": 4},
        {"stage": "finetune", "steps": 4, "pruner": pruner},
        {"stage": "report"},
    ]
    values = {"version": 1, "model": str(dense), "out": str(tmp_path / "out"), "stages": stages}
    result = pipeline.run(Recipe.from_dict({**values, "data": {"train": source, "calibration": source}}))
    assert result.report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.001)
    found = {layer["density"] for layer in result.report["layers"]}
    assert len(found) > 1 and min(found) > 0.15


def test_no_layer_is_emptied_by_default(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    kept = sparsify.prune(model, block=16, sparsity=0.9, convert=False).density["model.layers.0.mlp.up_proj"]
    assert kept == pytest.approx(0.03, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    result = sparsify.prune(model, block=16, sparsity=0.9, floor=0.0, convert=False)
    assert result.density["model.layers.0.mlp.up_proj"] == 0.0


def test_a_sensitivity_file_is_for_its_own_scope(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    with pytest.raises(ConfigError, match="is for the scope sensitivity, not for global"):
        sparsify.prune(model, block=16, sensitivity="file.json")
    with pytest.raises(ConfigError, match="needs the key `sensitivity`"):
        sparsify.prune(model, block=16, scope="sensitivity")
