"""`sparsify sweep`: what it measures, what it shares, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify import quality
from sparsify.calibration.walk import Walk
from sparsify.cli.main import app
from sparsify.data.spec import DataSpec, causal_blocks
from sparsify.layers.linear import BlockSparseLinear
from sparsify.sweep import file as sweep_file
from sparsify.sweep import plan as sweep_plan
from sparsify.sweep.run import Sweep
from tests.cli import checkpoints

FEW = (
    "--length", "32", "--samples", "8", "--eval-samples", "8", "--tokens", "8", "--repeats", "2", "--device", "cpu",
)  # fmt: skip
GRID = ("--blocks", "32x32,64x16", "--sparsities", "0.5,0.75")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    """Text to calibrate with, and other text to choose by."""
    train, held_out = checkpoints.text(tmp_path), tmp_path / "held_out.txt"
    held_out.write_text("a lazy dog jumps over the quick brown fox and is proud of it. " * 30)
    return train, held_out


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["sweep", *(str(argument) for argument in arguments)])


def sweep(model: Path, texts: tuple[Path, Path], out: Path, *arguments: object):
    train, held_out = texts
    return invoke(model, "--data", train, "--eval", held_out, "--out", out, *FEW, *GRID, *arguments)


def refused(result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_every_pair_is_pruned_as_prune_would_and_judged_beside_dense(model, texts, tmp_path):
    out = tmp_path / "sweep"
    result = sweep(model, texts, out, "--method", "wanda", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.pop("file") == str(out / "sweep.json")
    assert json.loads((out / "sweep.json").read_text()) == report and report["left"] == 0
    assert (out / "sweep.png").stat().st_size > 5000
    page = (out / "sweep.md").read_text()
    assert "| 64x16 | 75" in page and "perplexity on held_out.txt; speed beside dense on" in page
    pairs = [(row["block"], row["sparsity"]) for row in report["rows"]]
    assert pairs == [("32x32", 0.5), ("32x32", 0.75), ("64x16", 0.5), ("64x16", 0.75)]
    works = ["prefill of 8 tokens", "decoding after 8 tokens"]
    assert report["settings"]["workloads"] == works and report["settings"]["evaluated_on"] == "held_out.txt"
    for row in report["rows"]:
        assert row["removed"] == pytest.approx(row["sparsity"], abs=0.02)
        assert row["bytes"] < report["dense"]["bytes"] and list(row["times"]) == works
        for times in row["times"].values():
            assert times["speedup"] == pytest.approx(times["dense_us"] / times["sparse_us"])
            assert times["error"] < 1e-3
        more = 100 * (row["quality"]["perplexity"] / report["dense"]["quality"]["perplexity"] - 1)
        assert row["loss"] == pytest.approx(more)
    # The same by the command that it names.
    command = [
        "prune",
        model,
        "--out",
        tmp_path / "out",
        "--data",
        texts[0],
        "--method",
        "wanda",
        "--length",
        "32",
    ]
    command += ["--samples", "8", "--block", "64x16", "--sparsity", "0.75", "--device", "cpu"]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0
    pruned = sparsify.load(tmp_path / "out")
    held_out = causal_blocks(DataSpec(path=texts[1], length=32, samples=8), checkpoints.tokenizer())
    again = quality.perplexity(pruned, held_out)["perplexity"]
    assert report["rows"][3]["quality"]["perplexity"] == pytest.approx(again, rel=1e-5)
    dense = quality.perplexity(AutoModelForCausalLM.from_pretrained(model), held_out)["perplexity"]
    assert report["dense"]["quality"]["perplexity"] == pytest.approx(dense, rel=1e-5)


def test_one_walk_scores_all_sparsities_of_a_block_shape(model, texts, tmp_path, monkeypatch):
    walked, plain = [], Walk.__iter__

    def counted(self):
        walked.append(str(self.layers[0].block))
        return plain(self)

    monkeypatch.setattr(Walk, "__iter__", counted)
    result = sweep(model, texts, tmp_path / "sweep", "--method", "wanda")
    assert result.exit_code == 0, result.output
    assert walked == ["32x32", "64x16"]
    # Another sparsity later begins with these scores.
    result = sweep(model, texts, tmp_path / "sweep", "--method", "wanda", "--sparsities", "0.6")
    assert result.exit_code == 0 and walked == ["32x32", "64x16"]
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(report["rows"]) == 6


def test_an_interrupted_sweep_goes_on_and_a_finished_one_is_not_repeated(model, texts, tmp_path, monkeypatch):
    out, row, seen = tmp_path / "sweep", Sweep._row, []

    def stopping(self, state, block, sparsity, *arguments):
        if len(seen) == 3:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append((block, sparsity))
        return row(self, state, block, sparsity, *arguments)

    monkeypatch.setattr(Sweep, "_row", stopping)
    result = sweep(model, texts, out, "--method", "magnitude")
    assert result.exit_code == 130 and "what was measured is kept in" in result.stderr
    kept = json.loads((out / "sweep.json").read_text())
    assert len(kept["rows"]) == 3 and kept["left"] == 1
    dry = sweep(model, texts, out, "--method", "magnitude", "--dry-run")
    assert "4 pairs, 1 to be measured" in dry.stdout and "64x16 at 75%" in dry.stdout
    assert sweep(model, texts, out, "--method", "magnitude").exit_code == 0
    assert seen[4:] == [("64x16", 0.75)]
    report = json.loads((out / "sweep.json").read_text())
    assert report["rows"][:3] == kept["rows"] and report["left"] == 0
    assert sweep(model, texts, out, "--method", "magnitude", "--max-loss", "500").exit_code == 0
    assert len(seen) == 5
    assert "at most 500 per cent more perplexity" in json.loads((out / "sweep.json").read_text())["rule"]
    refused(sweep(model, texts, out, "--method", "random_blocks"), "was measured with another prune.method")
    refused(sweep(model, texts, out, "--method", "magnitude", "--dtype", "bfloat16"), "another dtype")
    assert sweep(model, texts, out, "--method", "magnitude", "--force").exit_code == 0
    assert len(seen) == 9


def test_another_machine_may_choose_but_not_measure(model, texts, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    one = ("--method", "magnitude", "--blocks", "32x32", "--sparsities", "0.5")
    assert sweep(model, texts, out, *one).exit_code == 0
    before = json.loads((out / "sweep.json").read_text())
    monkeypatch.setattr(sweep_plan, "device_name", lambda device: "another")
    refused(sweep(model, texts, out, "--method", "magnitude"), "was measured with another device")
    assert sweep(model, texts, out, *one, "--max-loss", "3").exit_code == 0
    after = json.loads((out / "sweep.json").read_text())
    assert (after["rows"], after["settings"]) == (before["rows"], before["settings"])
    assert after["rule"] == "the fastest that loses at most 3 per cent more perplexity"


def test_minutes_are_kept_to(model, texts, tmp_path):
    result = sweep(model, texts, tmp_path / "sweep", "--method", "magnitude", "--minutes", "0")
    assert result.exit_code == 0 and "4 of 4 pairs are left: run it again to go on" in result.stdout
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["left"] == 4


def test_another_model_of_that_name_is_told(model, texts, tmp_path):
    out = tmp_path / "sweep"
    assert sweep(model, texts, out, "--method", "magnitude", "--minutes", "0").exit_code == 0
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(3)
    folder = tmp_path / "other" / "dense"
    other.save_pretrained(folder)
    checkpoints.tokenizer().save_pretrained(folder)
    refused(sweep(folder, texts, out, "--method", "magnitude"), "was measured on a model whose perplexity is")


def test_a_sentence_encoder_is_judged_by_correlation(tmp_path):
    model, pairs = checkpoints.bert(tmp_path / "bert"), checkpoints.pairs(tmp_path)
    train = checkpoints.sentences(tmp_path)
    out = tmp_path / "sweep"
    arguments = (
        "--task",
        "sentence-embedding",
        "--batches",
        "1,2",
        "--reconstruct",
        "2",
        "--dtype",
        "bfloat16",
    )
    result = invoke(model, "--data", train, "--eval", pairs, "--out", out, *FEW, *GRID, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "sweep.json").read_text())
    assert report["settings"]["workloads"] == ["forward of 8 tokens", "forward of 2 x 8 tokens"]
    assert report["settings"]["prune.method"] == "block_obs"
    assert report["settings"]["prune.reconstruct"] == 2
    dense = report["dense"]["quality"]["spearman"]
    assert all(row["loss"] == pytest.approx(dense - row["quality"]["spearman"]) for row in report["rows"])
    assert "Spearman x 100" in result.stdout and "1: forward of 8 tokens" in result.stdout
    assert "spearman on pairs.csv" in result.stdout and result.stdout.count(", bfloat16") == 1


def test_the_best_choice_is_named_with_its_command(model, texts, tmp_path, monkeypatch):
    def times(self, pruned, dense):
        layer = pruned.model.layers[0].mlp.up_proj
        speed = 4.0 * (1 - layer.density) * (2 if layer.block_shape.rows == 64 else 1)
        return {
            str(work): {"speedup": speed, "dense_us": speed, "sparse_us": 1.0} for work in self.plan.works
        }

    monkeypatch.setattr(Sweep, "_times", times)
    arguments = ("--method", "magnitude", "--scope", "layer", "--max-loss", "1000")
    result = sweep(model, texts, tmp_path / "sweep", *arguments)
    assert result.exit_code == 0, result.output
    line = next(
        line for line in result.stdout.splitlines() if line.startswith("best for prefill of 8 tokens")
    )
    assert line.startswith("best for prefill of 8 tokens: 64x16 at 75%, 5.88x, perplexity ")
    command = next(line for line in result.stdout.splitlines() if line.startswith("  sparsify prune"))
    assert command.strip() == (
        f"sparsify prune {model} --out DIR --data {texts[0]} --method magnitude --samples 8 --scope layer --length 32 "
        f"--block 64x16 --sparsity 0.75"
    )
    assert "the choice is the fastest that loses at most 1000 per cent more perplexity" in result.stdout
    monkeypatch.setattr(sweep_file.Swept, "quality", lambda self, row: 20.0 if row is self.dense else 30.0)
    result = sweep(model, texts, tmp_path / "sweep", *arguments[:-1], "49")
    assert "no best choice for prefill of 8 tokens: nothing that is faster loses at most 49" in result.stdout
    result = sweep(model, texts, tmp_path / "sweep", *arguments[:-2])
    assert "no best choice for prefill of 8 tokens: the front has no knee, set --max-loss" in result.stdout


def test_wrong_outputs_are_not_given_a_speed(model, texts, tmp_path, monkeypatch):
    right = BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: right(self, x) * 1.1)
    refused(sweep(model, texts, tmp_path / "sweep", "--method", "magnitude"), "nothing is reported")


def test_a_dry_run_writes_nothing(model, texts, tmp_path):
    result = sweep(model, texts, tmp_path / "sweep", "--dry-run")
    assert result.exit_code == 0 and "4 pairs, 4 to be measured on" in result.stdout
    assert "quality on held_out.txt, speed in prefill of 8 tokens; decoding after 8 tokens" in result.stdout
    assert not (tmp_path / "sweep").exists()
    plan = json.loads(sweep(model, texts, tmp_path / "sweep", "--dry-run", "--json").stdout)
    assert plan["pairs"] == 4 and plan["left"][0] == {"block": "32x32", "sparsity": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "48x48"], "48"),
        (["--blocks", ","], "blocks: got none"),
        (["--blocks", "256x256"], "256x256"),
        (["--sparsities", "0.5,1"], "1"),
        (["--sparsities", "0"], "sparsities: got 0, expected above 0 and below 1"),
        (["--sparsities", "half"], "got 'half', expected numbers"),
        (["--tokens", "0"], "tokens: got '0', expected positive whole numbers"),
        (["--tokens", "9999"], "there is no speed to measure"),
        (["--batches", "x"], "batches: got 'x'"),
        (["--method", "none"], "none"),
        (["--option", "norm"], "expected key=value"),
        (["--target", "re:nothing"], "nothing"),
        (["--max-loss", "-1"], "max-loss: got -1, expected 0 or more"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--batch", "0"], "batch: got 0, expected at least 1"),
        (["--task", "image-classification"], "AutoModelForImageClassification"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_line(model, texts, tmp_path, arguments, message):
    refused(sweep(model, texts, tmp_path / "sweep", *arguments), message)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", ["sts-test.csv", "test.txt", "my_TEST_set.txt"])
def test_nothing_is_chosen_on_a_test_split(model, texts, tmp_path, name):
    file = tmp_path / name
    file.write_text(texts[1].read_text())
    refused(
        invoke(model, "--data", texts[0], "--eval", file, "--out", tmp_path / "sweep", *FEW),
        "looks like a test split, and nothing may be chosen on test data",
    )
    named = ("--eval", "wikitext:wikitext-2-raw-v1", "--split", "test[:100]")
    refused(invoke(model, *named, "--out", tmp_path / "sweep", *FEW), "looks like a test split")


def test_calibration_data_are_not_held_out(model, texts, tmp_path):
    for data, held_out in (
        ((texts[0],), (texts[0],)),
        ((tmp_path,), (texts[1],)),  # the folder that it lies in
        (("some:set",), ("some:set", "--split", "train")),
    ):
        arguments = ("--data", *data, "--eval", *held_out, "--out", tmp_path / "sweep", *FEW)
        refused(
            invoke(model, *arguments), "is part of --data: give held-out data, which calibration does not see"
        )


def test_a_folder_that_holds_something_else(model, texts, tmp_path):
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "sweep.json").write_text("[]")
    refused(sweep(model, texts, out), "is no sweep, or damaged: start over with --force")
    (out / "sweep.json").write_text('{"version": 7}')
    refused(sweep(model, texts, out), "written by another version")
    refused(sweep(model, texts, out / "sweep.json"), "is a file, expected a folder")


@pytest.mark.gpu
def test_on_a_gpu_prefill_and_decoding_are_timed_as_graphs(model, texts, tmp_path):
    train, held_out = texts
    arguments = ("--data", train, "--eval", held_out, "--out", tmp_path / "sweep", *FEW[:-2], *GRID)
    result = invoke(model, *arguments, "--device", "cuda", "--dtype", "bfloat16", "--reconstruct", "2")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(report["rows"]) == 4
    assert {times["timing"] for row in report["rows"] for times in row["times"].values()} == {"graph"}
