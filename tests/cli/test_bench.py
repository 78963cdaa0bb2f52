"""`sparsify bench`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import sparsify
from sparsify.cli.main import app
from sparsify.layers.linear import BlockSparseLinear
from tests.cli import checkpoints

FEW = ("--tokens", "1,8", "--repeats", "2", "--device", "cpu")


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def refused(message: str, *arguments: object) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    command = ["prune", str(dense), "--out", str(out), "--block", "32x32", "--scope", "layer"]
    assert CliRunner().invoke(app, command).exit_code == 0
    return out


def test_json_has_every_layer_and_the_model(sparse):
    result = invoke(sparse, *FEW, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["tokens"], report["device"], report["dtype"]) == ([1, 8], "cpu", "float32")
    assert sum(len(group["names"]) for group in report["layers"]) == 14
    for group in report["layers"]:
        assert [row["tokens"] for row in group["times"]] == [1, 8]
        assert group["bytes"] < group["bytes_dense"]
        assert all(
            row["dense_us"] > 0 and row["sparse_us"] > 0 and row["rounds"] == 2 for row in group["times"]
        )
    whole = report["end_to_end"]
    done = [(row["what"], row["batch"], row["tokens"]) for row in whole["times"]]
    assert done == [("prefill", 1, 1), ("prefill", 1, 8), ("decode", 1, 1), ("decode", 1, 8)]
    assert whole["bytes"] < whole["bytes_dense"] and "random values" in whole["dense"]
    assert report["environment"]["versions"]["torch"] == torch.__version__


def test_table_names_the_machine_and_ends_in_a_verdict(sparse, dense):
    result = invoke(sparse, "--against", dense, *FEW)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.search(r"1 thread of \d+ cores?, torch 2\..*, float32$", lines[0])
    assert re.search(
        r"│ model\.layers\.\d\.mlp\.down_proj +│ +\d │ +128x200 │ 32x32 │ +0\.\d{3} │", result.stdout
    )
    assert f"dense model: {dense}" in lines
    assert re.search(r"^At 1 token \d+ of 14 layers (is|are) .*; at 8 tokens \d+ of 14 layers .*; "
                     r"the whole model has \d+\.\d\dx in prefill of 1 token, .* in decoding after 8 tokens the",
                     result.stdout, re.M)  # fmt: skip


def test_other_dtypes(sparse):
    report = json.loads(invoke(sparse, *FEW, "--dtype", "bfloat16", "--json").stdout)
    assert report["dtype"] == "bfloat16" and report["layers"][0]["dtype"] == "bfloat16"
    assert 0 < report["end_to_end"]["times"][1]["error"] < 0.1


def test_wrong_outputs_are_not_given_a_speed(sparse, monkeypatch):
    right = BlockSparseLinear.forward

    def forward(self, x):
        y = right(self, x)
        if self.in_features == 200 and len(x) == 8:  # one element, at one token count
            y[3, 5] += 0.1
        return y

    monkeypatch.setattr(BlockSparseLinear, "forward", forward)
    refused("down_proj at 8 tokens differs from its dense equivalent by", sparse, *FEW)
    refused("nothing is reported", sparse, *FEW, "--json")


def test_a_model_that_differs_as_a_whole_is_refused(sparse, monkeypatch):
    from transformers import LlamaForCausalLM

    from sparsify.layers.swap import sparse_modules

    right = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = right(self, *args, **kwargs)
        if sparse_modules(self):
            output.logits *= 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    refused("the sparse model's output at prefill of 1 token differs", sparse, *FEW)


def test_a_dense_checkpoint_is_told_from_a_sparse_one(sparse, dense):
    refused(f"{dense} is a dense checkpoint, expected a block-sparse one", dense, *FEW)
    refused("is block-sparse itself: give the dense checkpoint", sparse, "--against", sparse, *FEW)
    refused("does not exist", "/no/such/folder", *FEW)
    refused("does not exist", sparse, "--against", "/no/such/folder", *FEW)


def test_another_model_is_no_measure(sparse, tmp_path):
    other = checkpoints.bert(tmp_path / "other")
    refused("has architectures ['BertModel']", sparse, "--against", other, *FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "tokens: got '0', expected positive whole numbers, such as 1,16,256"),
        (["--tokens", "1;2"], "tokens: got '1;2'"),
        (["--batches", "0"], "batches: got '0', expected positive whole numbers"),
        (["--out", "report.txt"], "cannot write report.txt: the report is JSON"),
        (["--repeats", "0"], "repeats: got 0, expected at least 1"),
        (["--dtype", "int8"], "dtype: got 'int8', expected auto, float32, float16 or bfloat16"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_options(sparse, options, message):
    refused(message, sparse, *options)


def test_nan_weights_are_named(sparse, tmp_path):
    broken = shutil.copytree(sparse, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused("weight model.layers.1.mlp.up_proj.weight holds NaN", broken, *FEW)


def test_a_model_of_other_inputs_is_timed_layer_by_layer(tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "dense")
    command = ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--block", "16"]
    assert CliRunner().invoke(app, command).exit_code == 0
    report = json.loads(invoke(tmp_path / "out", *FEW, "--energy", "--json").stdout)
    assert report["end_to_end"] is None and sum(len(group["names"]) for group in report["layers"]) == 6
    assert report["notes"][-2:] == [
        "end to end is not timed: ViTModel takes no tokens",
        "energy is not measured: nothing is timed end to end",
    ]


def test_batches_are_timed_and_written(sparse, tmp_path):
    file = tmp_path / "new" / "bench.json"
    result = invoke(sparse, *FEW, "--batches", "1,3", "--out", file)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["batches"] == [1, 3]
    works = {(row["what"], row["batch"], row["tokens"]) for row in report["end_to_end"]["times"]}
    assert works == {(what, b, n) for what in ("prefill", "decode") for b in (1, 3) for n in (1, 8)}
    # What a layer sees: a token of each sequence, or all of them.
    assert [row["tokens"] for row in report["layers"][0]["times"]] == [1, 3, 8, 24]
    assert f"written: {file}" in result.stdout and file.with_suffix(".png").stat().st_size > 5000
    assert "decoding of 3 sequences after 8 tokens" in result.stdout
    assert re.search(
        r"limits, measured here: \S+ TFLOP/s of a dense product, \S+ GB/s of a copy", result.stdout
    )
    refused("exists: choose another name, or replace it with --force", sparse, *FEW, "--out", file)
    assert invoke(sparse, *FEW, "--out", file, "--force", "--dry-run").exit_code == 0


def test_a_dry_run_measures_nothing(sparse, tmp_path):
    file = tmp_path / "bench.json"
    result = invoke(sparse, *FEW, "--out", file, "--dry-run")
    assert result.exit_code == 0 and not file.exists()
    assert (
        "14 block-sparse weights on cpu" in result.stdout and f"would be written to {file}" in result.stdout
    )
    facts = json.loads(invoke(sparse, *FEW, "--dry-run", "--json").stdout)
    assert facts == {"layers": 14, "tokens": [1, 8], "batches": [1], "device": "cpu", "file": None}


def test_pictures_are_counted_by_sample(tmp_path):
    dense = checkpoints.vit(tmp_path / "dense")
    command = ["prune", str(dense), "--out", str(tmp_path / "out"), "--block", "16"]
    assert CliRunner().invoke(app, command).exit_code == 0
    result = invoke(tmp_path / "out", "--repeats", "2", "--batches", "2", "--device", "cpu", "--json")
    report = json.loads(result.stdout)
    (row,) = report["end_to_end"]["times"]
    assert (row["what"], row["batch"], row["tokens"], row["unit"]) == ("forward", 2, 17, "sample")
    assert row["sparse_rate"] == pytest.approx(2e6 / row["sparse_us"])
    rows = [entry for group in report["layers"] for entry in group["times"]]
    assert {(entry["tokens"], entry["samples"]) for entry in rows} == {(34, 2)}
    assert "forward of 2 samples" in report["verdict"] and "at 2 samples " in report["verdict"].lower()


class Own(nn.Module):
    """A network that no config can build: convolutions, an LSTM in sequences of its own, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
        )
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.table, self.head, self.unused = nn.Embedding(50, 32), nn.Linear(32, 4), nn.Linear(24, 24)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, object]:
        x = self.conv(image).mean(2).transpose(1, 2) + self.table(ids)
        return {"name": "own", "logits": (self.head(self.lstm(x)[0][:, -1]),)}


def given(samples: int) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(samples, 3, 16, 16), "ids": torch.randint(50, (samples, 8))}


def nothing(samples: int) -> int:
    return samples


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("own"), Own()
    sparsify.save(model, folder / "dense")
    sparsify.prune(model, block="16x16", scope="layer", targets=["conv", "lstm", "unused"])
    return sparsify.save(model, folder / "sparse")


HERE = __name__


def test_a_plain_module_is_timed_as_it_is_used(own):
    options = ["--device", "cpu", "--repeats", "1", "--module", f"{HERE}:Own", "--inputs", f"{HERE}:given"]
    more = ["--batches", "1,3", "--against", own.with_name("dense"), "--json"]
    result = invoke(own, *options, *more)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    layers = {group["name"]: group for group in report["layers"]}
    seen = {
        name: [(row["samples"], row["tokens"]) for row in group["times"]] for name, group in layers.items()
    }
    assert seen == {"conv.2": [(1, 64), (3, 192)], "lstm": [(1, 8), (3, 24)], "unused": []}
    assert layers["unused"]["skipped"] == "not timed: the forward pass does not call it"
    times = report["end_to_end"]["times"]
    assert [(row["batch"], row["unit"]) for row in times] == [(1, "sample"), (3, "sample")]
    assert all(row["error"] < 1e-5 and row["sparse_us"] > 0 for row in times)
    assert report["end_to_end"]["bytes"] < report["end_to_end"]["bytes_dense"]


def test_layers_alone_of_a_plain_module(own):
    result = invoke(own, *FEW, "--module", f"{HERE}:Own", "--json")
    report = json.loads(result.stdout)
    assert {tuple(row["tokens"] for row in group["times"]) for group in report["layers"]} == {(1, 8)}
    assert report["end_to_end"] is None and "(--inputs)" in report["notes"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what builds it, as in --module"),
        (["--module", f"{HERE}:Missing"], "has no 'Missing'"),
        (["--module", "no_such_module:Own"], "write package.module:Class"),
        (["--module", f"{HERE}:given"], "cannot build a module: TypeError"),
        (["--module", "builtins:dict"], "gave a dict, expected an nn.Module"),
        (
            ["--module", f"{HERE}:Own", "--inputs", f"{HERE}:nothing"],
            "cannot make the inputs of a batch of 1: TypeError",
        ),
        (["--module", f"{HERE}:Own", "--inputs", "builtins:dict"], "cannot make the inputs"),
    ],
)
def test_what_a_plain_module_lacks(options, message, own):
    refused(message, own, *FEW, *options)


def test_a_module_beside_a_checkpoint_that_needs_none(sparse):
    refused(
        "is a checkpoint of transformers: load it without a module", sparse, *FEW, "--module", f"{HERE}:Own"
    )
    refused("inputs are for the checkpoint of a plain module", sparse, *FEW, "--inputs", f"{HERE}:given")


def test_energy_is_told_with_what_is_subtracted(sparse, monkeypatch):
    from sparsify.bench import energy

    class Meter:
        name = "a counter"

    left = iter([0.040, 0.010] * 2)

    def energy_of(call, meter, idle, wait):
        joules = next(left)
        return energy.Energy(joules, joules + 1, 95.5, idle.watts, 4.1, 100, 82)

    monkeypatch.setattr(energy, "open_meter", lambda device: Meter)
    monkeypatch.setattr(energy, "idle_power", lambda meter: energy.Idle(21.04, 0.05))
    monkeypatch.setattr(energy, "energy_of", energy_of)
    result = invoke(
        sparse, "--tokens", "8", "--batches", "2", "--repeats", "2", "--device", "cpu", "--energy"
    )
    assert result.exit_code == 0, result.output
    assert "energy: a counter; idle, 21.0 W, is subtracted" in result.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    cells = ["2.5", "0.625", "75%", "96", "96", "4.1", "82"]
    assert ["prefill of 2 x 8 tokens", "token", *cells] in rows
