"""The quickstart keeps its promises, touches nothing that is not its own, and fails when the model falls short."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart
import sparsify

COLUMNS = {
    "dense": {"bytes": 100, "latency": {"cpu": {1: 1.0, 256: 2.0}}},
    "recovered": {"bytes": 50, "latency": {"cpu": {1: 3.0, 256: 1.0}}},
}


def test_a_smaller_and_faster_model_has_no_shortcomings():
    assert quickstart.shortcomings(COLUMNS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": 100}, "takes 100 bytes on disk, the dense one 100"),
        (
            {"latency": {"cpu": {1: 0.5, 256: 2.0}}},
            "at 256 tokens it takes 2000.00 ms, the dense one 2000.00 ms",
        ),
    ],
    ids=["not smaller", "not faster"],
)
def test_a_model_that_falls_short_is_told(change, message):
    columns = copy.deepcopy(COLUMNS)
    columns["recovered"] |= change
    assert message in quickstart.shortcomings(columns)[0]


def test_a_second_run_replaces_its_own_files_alone(tmp_path):
    quickstart.prepare(tmp_path / "out")
    (tmp_path / "out" / "recovered").mkdir()
    (tmp_path / "out" / "recovered" / "model.safetensors").touch()
    (tmp_path / "out" / "quickstart.json").touch()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    quickstart.prepare(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".quickstart", "notes.txt"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_from_a_quickstart_is_left_alone(tmp_path, kind, capsys):
    out = tmp_path / "out"
    if kind == "folder":
        (out / "recovered").mkdir(parents=True)
        (out / "recovered" / "precious").touch()
    else:
        out.write_text("precious")
    assert quickstart.main(["--out", str(out)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {out} exists and is not from a quickstart; choose another folder with --out\n"
    )
    assert (out / "recovered" / "precious").exists() if kind == "folder" else out.read_text() == "precious"


def test_an_interruption_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "collect", interrupt)
    assert quickstart.main(["--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_the_recipe_prunes_attention_and_feed_forward_to_about_a_fifth():
    recipe = sparsify.Recipe.load(quickstart.RECIPE)
    steps = [stage for stage in recipe.stages if stage.stage == "prune"]
    assert steps[-1].sparsity == pytest.approx(0.8, abs=0.05)
    model = quickstart.load(quickstart.DENSE)
    result = sparsify.prune(model, block=steps[-1].block, sparsity=steps[-1].sparsity, scope=steps[-1].scope)
    names = {name.rsplit(".", 1)[1] for name in result.masks}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [kept.name for kept in result.kept_dense] == ["lm_head"]  # tied to the embedding


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_any_folder_to_a_table_and_a_line_of_text(tmp_path):
    script = Path(quickstart.__file__)
    steps = ["--set", "finetune.steps=30", "--set", "calibrate.samples=16", "--set", "prune.reconstruct=4"]
    command = [sys.executable, str(script), "--device", "cpu", *steps]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "quickstart-output"
    columns = json.loads((out / "quickstart.json").read_text())["columns"]
    dense, pruned, recovered = (columns[label] for label in ("dense", "pruned", "recovered"))
    assert dense["perplexity"] < recovered["perplexity"] < pruned["perplexity"]
    assert recovered["parameters"] < 0.35 * dense["parameters"]
    assert recovered["bytes"] < 0.35 * dense["bytes"]
    assert recovered["peak_memory"] < dense["peak_memory"]
    for text in (
        "held-out perplexity",
        "latency, 256 tokens",
        str(out / "recovered"),
        "If the file",
    ):
        assert text in done.stdout
    for name in ("masks.png", "loss.png", "recovered/sparsify_report.json", "recovered/tokenizer.json"):
        assert (out / name).stat().st_size > 0
