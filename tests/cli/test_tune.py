"""`sparsify tune`: what it prints, what it refuses, and what the next run makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsify.cli.main import app
from sparsify.kernels import dispatch
from sparsify.kernels.tuning_files import read
from tests.cli import checkpoints

FEW = ("--tokens", "1,8", "--repeats", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dispatch.forget()
    yield tmp_path / "cache" / "sparsify" / "tuning"
    dispatch.forget()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def sparse(dense, tmp_path) -> Path:
    command = ["prune", dense, "--out", tmp_path / "sparse", "--block", "32x32", "--scope", "layer"]
    assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    return tmp_path / "sparse"


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


def refused(message: str, *arguments: object) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_sparse_checkpoint_is_measured_layer_by_layer(sparse, cache):
    result = invoke(sparse, *FEW)
    assert result.exit_code == 0, result.output
    (file,) = cache.iterdir()
    lines = result.stdout.splitlines()
    assert lines[0] == f"measured on {file.stem}, kept in {file}"
    rows = [line.split("│") for line in lines if "reference" in line]
    assert {row[7].strip() for row in rows} == {"1", "8"}
    assert (
        sum(int(row[2]) for row in rows) == 2 * 14 > len(rows)
    )  # every layer counted, equal ones measured once
    assert f"{len(rows)} measurements made" in lines
    again = invoke(sparse, *FEW)
    assert f"0 measurements made, {len(rows)} were known already (--force measures them anew)" in again.stdout


def test_json_is_all_there_is(sparse, tmp_path):
    result = invoke(sparse, *FEW, "--json", "--out", tmp_path / "table.json")
    report = json.loads(result.stdout)
    assert (report["measured"], report["left"], report["dropped"]) == (len(report["rows"]), 0, [])
    assert report["file"] == str(tmp_path / "table.json")
    assert len(read(tmp_path / "table.json")) == len(report["rows"])
    assert {row["kernel"] for row in report["rows"]} == {"reference"}


def test_a_dense_checkpoint_needs_a_block_shape(dense):
    result = invoke(dense, "--block", "32x32,16x16", "--sparsity", "0.5", *FEW)
    assert result.exit_code == 0 and "16 measurements made" in result.stdout, result.output
    refused("say with --block and --sparsity", dense, *FEW)


def test_what_was_measured_is_what_prune_goes_by(dense, tmp_path):
    command = ["prune", str(dense), "--block", "32x32", "--scope", "layer", "--device", "cpu", "--out"]
    before = CliRunner().invoke(app, [*command, str(tmp_path / "a")])
    assert "nothing like the 14 pruned weights was measured" in before.stderr
    assert invoke(dense, "--block", "32x32", "--sparsity", "0.5", *FEW).exit_code == 0
    after = CliRunner().invoke(app, [*command, str(tmp_path / "b")])
    assert after.exit_code == 0 and "was measured" not in after.stderr


def test_ctrl_c_keeps_what_is_measured(monkeypatch, cache):
    from sparsify.tune import run

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "contest", stop)
    result = invoke("--shapes", "64x64", "--block", "16", "--sparsity", "0.5", *FEW)
    assert result.exit_code == 130 and "run it again to go on" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64y64"], "shapes: got '64y64', expected OUTxIN"),
        (["--shapes", "64x64", "--sparsity", "half"], "sparsity: got 'half', expected numbers"),
        (["--shapes", "64x64", "--block", "12"], "block shape 12x12 is not supported"),
        (["--shapes", "64x64", "--tokens", "1;2"], "tokens: got '1;2'"),
        (["--shapes", "64x64", "--device", "tpu"], "device 'tpu' cannot be used"),
        ([], "give a checkpoint or --shapes"),
        (["/no/such/folder"], "is neither a folder nor a model that the Hub gives us"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments, message):
    refused(message, *arguments)


def test_help_has_an_example():
    assert "Example: sparsify tune path/to/sparse" in " ".join(invoke("--help").stdout.split())
