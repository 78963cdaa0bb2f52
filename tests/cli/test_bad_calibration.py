"""Calibration data that are too short, empty, damaged or beside the point, and budgets that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from sparsify.cli.main import app
from tests.cli import checkpoints

METHODS = ["wanda", "block_obs"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense") / "model")


def prune(model: Path, folder: Path, *options: object):
    """`sparsify prune`, writing to a folder of its own inside `folder`."""
    (folder / "written").mkdir(exist_ok=True)
    out = folder / "written" / "out"
    command = ["prune", model, "--out", out, "--block", "16", "--dense-where-slower", "never", *options]
    return CliRunner().invoke(app, [str(part) for part in command])


def refused(message: str, model: Path, folder: Path, *options: object) -> None:
    """One `error:` line that holds `message`, exit status 2, and nothing left behind but a cache of scores."""
    result = prune(model, folder, *options)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("stage ")]
    assert errors[0].startswith("error: ") and message in " ".join(errors)
    assert result.stdout == "" and "Traceback" not in result.output
    left = {path.name for path in (folder / "written").iterdir()}
    assert left <= {"sparsify-scores"}, left


def spoiled(dense: Path, folder: Path) -> Path:
    """A model whose second block overflows though all of its weights are finite."""
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n\n", "holds less than one block of 64 tokens; give more text or lower `length`"),
        ("the quick brown fox", "holds less than one block of 64 tokens"),
    ],
    ids=["empty", "blank", "less than a sample"],
)
def test_data_without_a_single_sample(dense, tmp_path, method, text, message):
    (tmp_path / "text.txt").write_text(text)
    refused(message, dense, tmp_path, "--method", method, "--data", tmp_path / "text.txt", "--length", "64")


@pytest.mark.parametrize("method", METHODS)
def test_data_that_is_shorter_than_asked_is_used_and_said(dense, tmp_path, method):
    (tmp_path / "text.txt").write_text(checkpoints.TEXT)
    given = ("--method", method, "--data", tmp_path / "text.txt", "--length", "32", "--samples", "128")
    result = prune(dense, tmp_path, *given)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "calibrate: the data hold 2 samples, fewer than the 128 asked for" in said
    singular = "64 tokens are fewer than the 200 inputs of layer model.layers.0.mlp.down_proj: its Hessian is singular"
    assert (singular in said) == (method == "block_obs")


def test_enough_data_is_used_without_a_word(dense, tmp_path):
    (tmp_path / "text.txt").write_text(checkpoints.TEXT * 60)
    result = prune(
        dense, tmp_path, "--method", "block_obs", "--data", tmp_path / "text.txt", "--length", "32"
    )
    assert result.exit_code == 0, result.output
    assert "calibrate:" not in result.stderr


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_overflow_name_the_first_layer_that_gets_them(dense, tmp_path, method):
    model, text = spoiled(dense, tmp_path / "spoiled"), checkpoints.text(tmp_path)
    message = "calibration inputs of layer model.layers.1.self_attn.q_proj hold NaN or infinity: look for"
    refused(message, model, tmp_path, "--method", method, "--data", text, "--length", "32")


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_no_calibration_reaches(tmp_path, method):
    """Cross-attention that a decoder has but, called alone, never runs."""
    config = GPT2Config(
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    checkpoints.tokenizer().save_pretrained(tmp_path / "model")
    options = ["--method", method, "--data", checkpoints.text(tmp_path), "--length", "32"]
    message = "layer transformer.h.0.crossattention.c_attn saw no calibration input"
    refused(message, tmp_path / "model", tmp_path, *options)
    result = prune(tmp_path / "model", tmp_path, *options, "--ignore", "re:crossattention")
    assert result.exit_code == 0, result.output


def test_a_pruner_that_needs_data_and_gets_none(dense, tmp_path):
    for method, statistic in (("wanda", "input_sq"), ("block_obs", "hessian")):
        refused(f"pruner '{method}' needs the statistic '{statistic}'", dense, tmp_path, "--method", method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--floor", "0.8"], "floor 0.8 cannot be kept at sparsity 0.5: layers would keep 0.5 on average"),
        (["--ceiling", "0.3"], "ceiling 0.3 cannot be kept at sparsity 0.5"),
        (["--floor", "0.6", "--ceiling", "0.4"], "floor 0.6 is above ceiling 0.4"),
        (["--sparsity", "0.95", "--floor", "0.1"], "floor 0.1 cannot be kept at sparsity 0.95"),
        (["--floor", "-1"], "floor: got -1.0"),
        (["--scope", "erdos_renyi", "--floor", "0.8"], "floor 0.8 cannot be kept at sparsity 0.5"),
        (["--option", "damping=0", "--method", "block_obs"], "damping 0 is out of range: it must be above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_budget_that_bounds_make_impossible_is_refused_before_any_weight_is_read(
    dense, tmp_path, monkeypatch, options, message
):
    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("sparsify.checkpoint.reader.load", load)
    refused(message, dense, tmp_path, *options)
