"""The commands on a network of convolutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from sparsify.cli.main import app
from tests.architectures.zoo import BY_NAME
from tests.cli import checkpoints


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A small ResNet beside the processor of pictures of 32 x 32."""
    BY_NAME["resnet"].build().save_pretrained(tmp_path / "dense")
    (checkpoints.vit(tmp_path / "vit") / "preprocessor_config.json").rename(
        tmp_path / "dense" / "preprocessor_config.json"
    )
    return tmp_path / "dense"


def _call(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("options", [[], ["--per-position"]], ids=["shared", "each"])
def test_pruned_inspected_and_made_dense_again(resnet: Path, tmp_path: Path, options: list[str]) -> None:
    command = [
        "prune",
        resnet,
        "--out",
        tmp_path / "sparse",
        "--block",
        "16x16",
        "--sparsity",
        "0.75",
        *options,
    ]
    planned = _call(*command, "--dry-run")
    assert not (tmp_path / "sparse").exists()
    report = _call(*command)["report"]
    assert report["totals"]["sparsity"] == pytest.approx(0.75, abs=0.001)
    assert report["totals"]["layers"] == len(planned["layers"])
    kept = {layer["name"]: (layer["shape"], layer["reason"]) for layer in planned["kept_dense"]}
    assert kept["resnet.embedder.embedder.convolution"] == ([32, 3, 7, 7], "outside the repeated blocks")
    info = _call("inspect", tmp_path / "sparse")
    dense = AutoModelForImageClassification.from_pretrained(resnet)
    weights = {name: list(weight.shape) for name, weight in dense.named_parameters() if weight.dim() == 4}
    for layer in info["layers"]:
        assert layer["kind"] == "convolution" and layer["shape"] == weights[f"{layer['name']}.weight"]
    _call("densify", tmp_path / "sparse", "--out", tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    sparse = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse")
    for (name, old), new in zip(dense.named_parameters(), again.parameters(), strict=True):
        zero = new == 0
        assert torch.equal(old.masked_fill(zero, 0), new), name
    pixels = BY_NAME["resnet"].batch()["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(sparse(pixels).logits, again(pixels).logits, rtol=1e-3, atol=1e-4)


def test_trained_by_the_recipe_for_pictures(resnet: Path, tmp_path: Path) -> None:
    pictures = checkpoints.pictures(tmp_path)
    steps = [f"stages.{stage}.{key}" for stage in (2, 4) for key in ("steps=3", "epochs=", "batch=4")]
    settings = [*steps, "stages.2.pruner.block=32x32", "stages.4.heal=packed"]
    settings += [f"data.{use}.path={pictures}" for use in ("train", "eval")]
    sets = [part for setting in settings for part in ("--set", setting)]
    report = _call("run", "vit_classification", "--model", resnet, "--out", tmp_path / "out", *sets)["report"]
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["columns"]["recovered"]["bytes"] < 0.65 * report["columns"]["dense"]["bytes"]
    assert "sparsify bench` measures them" in " ".join(report["notes"])


def test_calibrated_pruning(resnet: Path, tmp_path: Path) -> None:
    pictures = checkpoints.pictures(tmp_path)
    report = _call(
        "prune", resnet, "--out", tmp_path / "out", "--block", "32x32", "--data", pictures, "--samples", "6",
        "--reconstruct", "2", "--method", "block_obs", "--task", "image-classification",
        "--ignore", r"re:stages\.[123]",
    )["report"]  # fmt: skip
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
