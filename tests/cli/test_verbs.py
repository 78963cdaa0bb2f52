"""The verbs: what they write, what they print, and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import sparsify
from sparsify.cli.main import app, main
from sparsify.layers.swap import sparse_modules
from tests.cli import checkpoints

VERBS = [
    "run",
    "prune",
    "inspect",
    "eval",
    "bench",
    "densify",
    "pruners",
    "recipe list",
    "recipe show",
    "recipe validate",
]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(*arguments: object):
    """Runs a verb with --json; stdout must be one JSON document and nothing else."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    assert invoke("prune", dense, "--out", out, "--block", "32x32").exit_code == 0
    return out


def stored_elements(folder: Path) -> int:
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_its_help_with_a_command_that_parses(verb):
    command = get_command(app)
    for part in verb.split():
        command = command.commands[part]  # pyright: ignore[reportAttributeAccessIssue]
    assert command.epilog is not None and command.epilog.startswith(f"Example: sparsify {verb}")
    arguments = command.epilog.partition(f"sparsify {verb}")[2].partition(">")[0].split()
    command.make_context(verb, arguments)
    assert command.epilog.split()[-1] in " ".join(invoke(*verb.split(), "--help").stdout.split())


def test_version_names_the_package():
    assert invoke("--version").stdout == f"sparsify {sparsify.__version__}\n"


def test_help_is_quick_because_it_loads_no_framework():
    code = "import sys; from sparsify.cli.main import app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_prune_writes_a_checkpoint_that_plain_from_pretrained_loads(dense, tmp_path):
    out = tmp_path / "out"
    result = invoke("prune", dense, "--out", out, "--method", "magnitude", "--block", "32x16", "--sparsity", 0.75,
                    "--scope", "layer", "--target", "re:mlp", "--target", "re:q_proj", "--ignore", "re:layers.1.*down",
                    "--option", "norm=l1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "7 weights pruned, 7" in result.stdout and f"written to {out}" in result.stdout
    modules = sparse_modules(AutoModelForCausalLM.from_pretrained(out))
    assert len(modules) == 7 and not any("layers.1.mlp.down_proj" in name for name in modules)
    assert {str(module.packed["weight"].block) for module in modules.values()} == {"32x16"}
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "sparsify_recipe.yaml",
        "sparsify_report.html", "sparsify_report.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert stored_elements(out) < stored_elements(dense)


def test_prune_and_run_are_one_path(dense, sparse, tmp_path):
    again = tmp_path / "again"
    assert invoke("run", sparse / "sparsify_recipe.yaml", "--model", dense, "--out", again).exit_code == 0
    assert checkpoints.digests(again) == checkpoints.digests(sparse)


def test_prune_calibrates_a_custom_pruner_from_a_data_file(dense, tmp_path, monkeypatch):
    (tmp_path / "input_pruner.py").write_text(
        "from sparsify import Pruner\n"
        "from sparsify.blocks import to_blocks\n"
        "class Inputs(Pruner):\n"
        "    requires = frozenset({'input_sq'})\n"
        "    def score(self, layer):\n"
        "        return to_blocks(layer.weight.abs() * layer.statistics['input_sq'].sqrt(), layer.block).sum((2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = checkpoints.text(tmp_path)
    document = json_of("prune", dense, "--out", tmp_path / "out", "--method", "input_pruner:Inputs", "--data", data,
                       "--length", "64", "--block", "32")  # fmt: skip
    assert document["report"]["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    sys.modules.pop("input_pruner")


def test_pruner_is_found_in_the_current_folder(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As an installed command has it: its own folder first, the current one nowhere.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    Path("nearby_pruner.py").write_text(
        "import sparsify\n"
        "from sparsify.blocks import to_blocks\n"
        "class Nearby(sparsify.Pruner):\n"
        "    def score(self, layer):\n"
        "        return to_blocks(layer.weight, layer.block).abs().sum((2, 3))\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(dense), "--out", "out", "--block", "32", "--method", "nearby_pruner:Nearby"])
    assert not ended.value.code and (tmp_path / "out" / "config.json").is_file()
    sys.modules.pop("nearby_pruner")


def test_dry_run_says_what_would_happen_and_writes_nothing(dense, tmp_path):
    out = tmp_path / "out"
    plan = json_of("prune", dense, "--out", out, "--block", "32x32", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert len(plan["layers"]) == 14 and plan["sparsity"] == 0.5
    assert (
        plan["kept_dense"][0]["name"] == "lm_head" and "shares its weight" in plan["kept_dense"][0]["reason"]
    )
    assert invoke("prune", dense, "--out", out, "--block", "32x32").exit_code == 0
    assert plan["bytes_out"] == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.05)
    text = invoke("prune", dense, "--out", tmp_path / "other", "--block", "32x32", "--dry-run").stdout
    assert "1. prune: magnitude, 50% in blocks of 32x32, scope global" in text
    assert "would be written to" in text and "model.layers.1.mlp.down_proj" in text


def test_run_takes_settings_from_the_command_line(dense, tmp_path):
    document = json_of("run", "magnitude_oneshot", "--model", dense, "--out", tmp_path / "out",
                       "--set", "prune.sparsity=0.6", "--set", "prune.block=32", "--set", "stages.0.latency_tokens=[4]",
                       "--set", "stages.3.latency_tokens=[4]", "--device", "cpu", "--dtype", "bfloat16")  # fmt: skip
    report = document["report"]
    assert report["totals"]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert (report["recipe"]["device"], report["recipe"]["dtype"]) == ("cpu", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert set(report["columns"]["pruned"]["latency"]) == {"4"}


def test_offloading_without_a_gpu_says_that_it_does_nothing(dense, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = invoke("prune", dense, "--out", tmp_path / "out", "--offload", "--dry-run")
    assert result.exit_code == 0 and "nothing is offloaded" in result.output


def test_dry_run_of_a_recipe_lists_its_stages(dense, tmp_path):
    result = invoke("run", "magnitude_oneshot", "--model", dense, "--out", tmp_path / "out", "--set", "prune.block=32",
                    "--dry-run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [line.strip() for line in result.stdout.splitlines()[1:6]] == [
        "1. evaluate: dense",
        "2. prune: magnitude, 50% in blocks of 32x32, scope global",
        "3. convert: block_sparse",
        "4. evaluate: pruned",
        "5. report",
    ]
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_each_layer_from_the_files_alone(sparse, dense):
    document = json_of("inspect", sparse)
    layers = {layer["name"]: layer for layer in document["layers"]}
    assert len(layers) == 14
    layer = layers["model.layers.0.mlp.up_proj"]
    assert (layer["shape"], layer["block"], layer["kind"]) == ([200, 128], "32x32", "linear")
    total = sum(layer["bytes_stored"] for layer in layers.values()) + document["dense_bytes"]
    assert total < document["total_bytes"] == (sparse / "model.safetensors").stat().st_size < total + 20_000
    table = invoke("inspect", sparse).stdout
    assert re.search(r"model\.layers\.0\.mlp\.up_proj +│ 200x128 │ 32x32 │ +0\.\d{3} │", table)
    assert "14 block-sparse weights take" in table
    assert "no block-sparse layers: a dense checkpoint" in invoke("inspect", dense).stdout


def test_eval_sets_sparse_beside_dense(sparse, dense, tmp_path):
    data = checkpoints.text(tmp_path)
    arguments = [
        "eval",
        sparse,
        "--against",
        dense,
        "--data",
        data,
        "--length",
        32,
        "--samples",
        16,
        "--tokens",
        8,
    ]
    document = json_of(*arguments)
    assert list(document["columns"]) == ["dense", "sparse"] and document["task"] == "causal-lm"
    columns = document["columns"]
    assert columns["sparse"]["parameters"] < 0.7 * columns["dense"]["parameters"]
    assert columns["sparse"]["quality"]["perplexity"] != columns["dense"]["quality"]["perplexity"]
    table = invoke(*arguments).stdout
    for row in ("perplexity", "parameters", "bytes on disk", "peak memory of a forward", "latency, 8 tokens"):
        assert row in table


def test_eval_of_labelled_texts_and_of_scored_pairs(tmp_path):
    classifier = checkpoints.bert_classifier(tmp_path / "classifier")
    document = json_of("eval", classifier, "--data", checkpoints.labelled(tmp_path), "--tokens", 0)
    assert document["columns"]["dense"]["quality"] == {"accuracy": pytest.approx(50, abs=50), "samples": 32}
    encoder = checkpoints.bert(tmp_path / "encoder")
    columns = [part for name in ("sentence1", "sentence2", "score") for part in ("--column", name)]
    document = json_of("eval", encoder, "--data", checkpoints.pairs(tmp_path), "--task", "sentence-embedding",
                       "--tokens", 0, *columns)  # fmt: skip
    assert -100 <= document["columns"]["dense"]["quality"]["spearman"] <= 100


def test_densify_goes_back_to_an_ordinary_checkpoint(sparse, tmp_path):
    out = tmp_path / "dense"
    plan = json_of("densify", sparse, "--out", out, "--dry-run")
    assert plan["layers"] == 14 and not plan["written"] and not out.exists()
    result = invoke("densify", sparse, "--out", out)
    assert result.exit_code == 0 and f"written to {out}" in result.stdout
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (sparse, out))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_recipe_list_show_validate(tmp_path):
    names = [entry["name"] for entry in json_of("recipe", "list")]
    assert "magnitude_oneshot" in names
    text = invoke("recipe", "show", "magnitude_oneshot").stdout
    assert text.startswith("# Magnitude, one shot")
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    result = invoke("recipe", "validate", copy)
    assert result.stdout == f"{copy} is valid: evaluate, prune, convert, evaluate, report\n"
    assert (
        json_of("recipe", "validate", copy, "--set", "prune.sparsity=0.25")["stages"][1]["sparsity"] == 0.25
    )


def test_pruners_are_listed_with_their_options():
    entries = {entry["name"]: entry for entry in json_of("pruners")}
    assert {"magnitude", "group_lasso"} <= set(entries)
    assert "norm" in entries["magnitude"]["options"] and entries["magnitude"]["summary"]
    needs = {name: entries[name]["needs"] for name in ("magnitude", "block_obs", "group_lasso")}
    assert needs == {"magnitude": "", "block_obs": "data", "group_lasso": "training"}


@pytest.mark.filterwarnings("default::UserWarning")
def test_random_weights_are_never_silent(dense):
    result = invoke("eval", dense, "--task", "sequence-classification", "--tokens", 0)
    assert result.exit_code == 0
    assert "warning: " in result.stderr and "has no weights for 1 of the parameters" in result.stderr
    assert "LlamaForSequenceClassification (the first is score.weight): they are random" in result.stderr


def test_sigterm_ends_the_command_with_one_line_and_its_own_code(dense, tmp_path, monkeypatch):
    from sparsify import pipeline
    from sparsify.runtime.interruptions import Terminated

    def run(*args, **options):
        raise Terminated("terminated: finished work is kept; run the same command with --resume to go on")

    monkeypatch.setattr(pipeline, "run", run)
    result = invoke("run", "magnitude_oneshot", "--model", dense, "--out", tmp_path / "out")
    assert result.exit_code == 143
    assert result.stderr.strip().endswith("--resume to go on") and result.stderr.count("\n") == 1
