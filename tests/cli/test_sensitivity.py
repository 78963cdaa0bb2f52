"""`sparsify sensitivity`: what it measures, how it goes on after an interruption, and what pruning makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify.checkpoint.reader import open_checkpoint
from sparsify.cli.main import app
from sparsify.sensitivity import Sensitivity
from tests.cli import checkpoints

FEW = ("--block", "32x32", "--samples", "4", "--batch", "2", "--length", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of which one layer does nothing, so that losing it costs nothing."""
    folder = checkpoints.llama(tmp_path_factory.mktemp("models") / "dense")
    llama = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    return checkpoints.text(tmp_path)


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measure(model: Path, text: Path, *arguments: object):
    return invoke("sensitivity", model, "--data", text, *FEW, *arguments)


def refused(result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_it_measures_each_layer_alone_and_draws_it(model, text):
    result = measure(model, text, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    file = model.with_name("dense.sensitivity.json")
    assert Path(report["file"]) == file.resolve() and file.with_suffix(".png").stat().st_size > 5000
    assert json.loads(file.read_text()) == {key: value for key, value in report.items() if key != "file"}
    assert report["settings"]["sparsities"] == [0.25, 0.5, 0.75, 0.9] and report["left"] == 0
    by_name = {layer["name"]: layer["increase"] for layer in report["layers"]}
    assert len(by_name) == 14
    assert by_name["model.layers.1.mlp.down_proj"] == [0.0] * 4
    # By hand, for one layer at one sparsity.
    llama = AutoModelForCausalLM.from_pretrained(model)
    pruned = AutoModelForCausalLM.from_pretrained(model)
    name = "model.layers.0.self_attn.o_proj"
    sparsify.prune(pruned, block="32x32", sparsity=0.75, scope="layer", targets=[name], convert=False)
    tokenizer = checkpoints.tokenizer()
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    rows = blocks[[index * len(blocks) // 4 for index in range(4)]]
    with torch.no_grad():
        rise = pruned(input_ids=rows, labels=rows).loss - llama(input_ids=rows, labels=rows).loss
    assert by_name[name][2] == pytest.approx(float(rise), abs=1e-4)
    file.unlink()


def test_an_interrupted_measurement_goes_on_and_a_finished_one_is_not_repeated(
    model, text, tmp_path, monkeypatch
):
    file = tmp_path / "file.json"
    of_layer, seen = Sensitivity._of_layer, []

    def stopping(self, layer, *arguments):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(layer.name)
        return of_layer(self, layer, *arguments)

    monkeypatch.setattr(Sensitivity, "_of_layer", stopping)
    result = measure(model, text, "--out", file)
    assert result.exit_code == 130 and "what was measured is kept" in result.stderr
    assert json.loads(file.read_text())["left"] == 9
    sparse = invoke(
        "prune", model, "--out", tmp_path / "out", "--block", "32x32",
        "--scope", "sensitivity", "--sensitivity", file,
    )  # fmt: skip
    refused(sparse, "lacks 9 layers still to be measured")
    seen[:] = ["once"]
    monkeypatch.setattr(Sensitivity, "_of_layer", lambda *a: (seen.append(a[1].name), of_layer(*a))[1])
    assert measure(model, text, "--out", file).exit_code == 0
    assert len(seen) == 1 + 9
    again = measure(model, text, "--out", file)
    assert again.exit_code == 0 and len(seen) == 1 + 9
    assert "--scope sensitivity --sensitivity" in again.stdout
    refused(measure(model, text, "--out", file, "--sparsity", "0.5"), "measured with another sparsities")
    refused(measure(model, text, "--out", file, "--option", "norm=l1"), "measured with another options")


def test_pruning_by_it_spares_what_costs_and_takes_what_does_not(model, text, tmp_path):
    file, out = tmp_path / "file.json", tmp_path / "sparse"
    assert measure(model, text, "--out", file, "--sparsity", "0.5,0.9").exit_code == 0
    measured = json.loads(file.read_text())
    for layer in measured["layers"]:  # an untrained model's loss says little
        layer["increase"] = [0.0, 0.0] if layer["name"] == "model.layers.1.mlp.down_proj" else [1.0, 3.0]
    file.write_text(json.dumps(measured))
    command = ["prune", model, "--out", out, "--block", "32x32", "--sparsity", "0.5", "--floor", "0.1"]
    result = invoke(
        *command, "--scope", "sensitivity", "--sensitivity", file, "--dense-where-slower", "never"
    )
    assert result.exit_code == 0, result.output
    density = {layer.name: layer.density for layer in open_checkpoint(out).layers}
    assert 0.06 < density["model.layers.1.mlp.down_proj"] < 0.15  # within a block of the floor
    kept = sum(layer.density * layer.shape[0] * layer.shape[1] for layer in open_checkpoint(out).layers)
    total = sum(layer.shape[0] * layer.shape[1] for layer in open_checkpoint(out).layers)
    assert abs(kept - total / 2) <= 32 * 32 / 2
    wrong = [*command[:4], "--block", "16x16", "--force", "--scope", "sensitivity", "--sensitivity", file]
    refused(invoke(*wrong, "--dry-run"), "in blocks of 32x32, but it is")


def test_a_sentence_encoder_is_judged_without_scores(tmp_path):
    model, pairs = checkpoints.bert(tmp_path / "bert"), tmp_path / "pairs.csv"
    rows = [f"the dog {i},the fox {i},{i % 5}" for i in range(6)]
    pairs.write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    result = measure(model, pairs, "--task", "sentence-embedding", "--json", "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["unit"].startswith("1 - cosine") and report["loss"] == pytest.approx(0.0, abs=1e-6)
    assert all(0 < layer["increase"][0] < 2 for layer in report["layers"])


def test_a_dry_run_says_what_would_be_measured(model, text, tmp_path):
    result = measure(model, text, "--out", tmp_path / "file.json", "--dry-run")
    assert result.exit_code == 0 and "14 layers, 57 passes" in result.stdout
    assert not (tmp_path / "file.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity: got 1.5, expected above 0 and below 1"),
        (["--sparsity", "some"], "sparsity: got 'some', expected numbers"),
        (["--block", "48"], "block"),
        (["--samples", "0"], "samples"),
        (["--target", "re:nothing"], "nothing"),
        (["--option", "norm"], "expected key=value"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(model, text, tmp_path, arguments, message):
    refused(measure(model, text, "--out", tmp_path / "file.json", *arguments), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no sensitivity file"),
        ("{}", "is not a sensitivity file"),
        ('{"version": 9}', "written by another version"),
        ("[1, 2]", "is not a sensitivity file"),
    ],
    ids=["missing", "empty", "version", "list"],
)
def test_pruning_refuses_a_file_that_is_none(model, tmp_path, content, message):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    arguments = ["--out", tmp_path / "out", "--scope", "sensitivity", "--sensitivity", file]
    refused(invoke("prune", model, *arguments), message)
