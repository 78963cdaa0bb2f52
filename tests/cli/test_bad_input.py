"""Bad input at the command line: one line that says what to do, exit code 2, nothing lost or half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparsify.checkpoint import writer
from sparsify.cli.main import app
from sparsify.pruner import PrunableLayer
from tests.cli import checkpoints

INTERRUPTED = 130


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def dense(clean, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(clean, tmp_path / "dense")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(message: str, *arguments: object) -> None:
    """The command must fail with one `error:` line that holds `message`, and leave its folder as it was."""
    folder = next(Path(str(argument)).parent for argument in arguments if str(argument).startswith("/"))
    before = snapshot(folder)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--block", "0"],
            "block shape 0x0 is not supported: each side must be a power of two from 8 to 256",
        ),
        (["--block", "48"], "block shape 48x48 is not supported"),
        (["--block", "3x5"], "block shape 3x5 is not supported"),
        (["--block", "512"], "block shape 512x512 is not supported"),
        (["--block", "large"], "cannot read block shape 'large'"),
        (["--sparsity", "1"], "must be at least 0 and less than 1, got 1"),
        (["--sparsity", "50"], "for 50 % write 0.5"),
        (["--sparsity", "-0.5"], "error: sparsity: got -0.5"),
        (["--sparsity", "nan"], "error: sparsity: got nan"),
        (
            ["--scope", "all"],
            "error: scope: got 'all', expected global, layer, row, erdos_renyi, ",
        ),
        (["--method", "magnitde"], "unknown pruner 'magnitde': did you mean 'magnitude'?"),
        (["--method", "no.such:Pruner"], "cannot import pruner 'no.such:Pruner'"),
        (["--option", "norm=l7"], "l7"),
        (["--option", "norm"], "--option norm: expected key=value"),
        (["--option", "nrom=l2"], "has no option 'nrom': did you mean 'norm'?"),
        (["--target", "q_porj"], "target 'q_porj' matches nothing"),
        (["--target", "re:("], "is not a regular expression"),
        (["--target", "lm_head"], "shares its weight with"),
        (["--ignore", "q_porj"], "ignore 'q_porj' matches nothing"),
        (["--ignore", "re:."], "nothing is left to prune"),
        (["--block", "256"], "smaller than one block of 256x256"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--dtype", "int8"], "dtype: got 'int8', expected auto, float32, float16 or bfloat16"),
        (["--task", "chess"], "task: got 'chess', expected auto"),
        (["--data", "/no/such/file.txt"], "does not exist"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_prune_refuses_bad_options(clean, tmp_path, options, message):
    refused(message, "prune", clean, "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_several_faults_are_told_at_once(clean, tmp_path):
    result = invoke(
        "prune", clean, "--out", tmp_path / "out", "--block", "48", "--sparsity", "2", "--scope", "all"
    )
    assert result.exit_code == 2
    assert "3 faults" in result.stderr
    assert all(word in result.stderr for word in ("48x48", "for 2 % write 0.02", "'all'"))


def test_yaml_typo_is_told_with_its_line_and_the_right_word(tmp_path, clean):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nstages:\n  - stage: prune\n    sparsty: 0.5\n  - stage: convrt\n")
    message = "line 4: stages.0.sparsty: unknown key; did you mean 'sparsity'?"
    refused(message, "run", recipe, "--model", clean, "--out", tmp_path / "out")
    refused("line 5: stages.1: unknown stage 'convrt'; did you mean 'convert'?", "recipe", "validate", recipe)
    refused(
        "no recipe file or packaged recipe is called 'magnitude'",
        "run",
        "magnitude",
        "--out",
        tmp_path / "out",
    )


def test_nan_weights_are_named(dense, out):
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    refused(
        "weight model.layers.1.mlp.up_proj.weight holds NaN", "prune", dense, "--out", out, "--block", "32"
    )
    assert not out.exists()

    refused("holds NaN", "eval", dense, "--tokens", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "batch 0 is out of range"),
        (["--tokens", "-5"], "token count -5 is out of range"),
        (["--length", "0"], "data `length` is 0"),
        (["--length", "257"], "samples of 257 tokens are longer than the 256 that LlamaForCausalLM takes"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_eval_refuses_bad_numbers(clean, tmp_path, options, message):
    refused(message, "eval", clean, "--data", checkpoints.text(tmp_path), *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized (gptq)"),
        ({"quantization_config": {"quant_method": "unheard_of"}}, "is quantized (unheard_of)"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 64}, "cannot load"),
        ({"model_type": "unheard_of"}, "model type `unheard_of`"),
    ],
    ids=["gptq", "unknown-method", "type", "size", "model-type"],
)
def test_config_that_does_not_fit(dense, out, change, message):
    config = json.loads((dense / "config.json").read_text()) | change
    (dense / "config.json").write_text(json.dumps(config))
    refused(message, "prune", dense, "--out", out, "--block", "32")


def test_damaged_tokenizer(dense, out):
    (dense / "tokenizer.json").write_text('{"version": "1.0"}')
    refused("cannot load the tokenizer of", "prune", dense, "--out", out, "--block", "32")


def test_pruner_that_cannot_be_imported(clean, tmp_path, out, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_written_pruner.py").write_text("class Half(")
    refused("SyntaxError", "prune", clean, "--out", out, "--method", "half_written_pruner:Half")


def test_block_sparse_source_is_not_pruned_anew(clean, tmp_path):
    sparse = tmp_path / "sparse"
    assert invoke("prune", clean, "--out", sparse, "--block", "32").exit_code == 0
    refused(
        "its layers are block-sparse already", "prune", sparse, "--out", tmp_path / "out", "--block", "32"
    )


def test_missing_shard(clean, tmp_path, out):
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(clean).save_pretrained(sharded, max_shard_size="300KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused(
        f"the first is {shards[1].name}: fetch them again", "prune", sharded, "--out", out, "--block", "32"
    )
    refused(shards[1].name, "inspect", sharded)


def test_truncated_weights(dense, out):
    file = dense / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    refused("model.safetensors is truncated", "prune", dense, "--out", out, "--block", "32")
    refused("model.safetensors is truncated", "run", "magnitude_oneshot", "--model", dense, "--out", out)
    refused("model.safetensors is truncated", "eval", dense)


def test_pickle_checkpoint_is_not_loaded(dense, out):
    (dense / "model.safetensors").unlink()
    torch.save({}, dense / "pytorch_model.bin")
    refused("holds only pickle weights (pytorch_model.bin)", "prune", dense, "--out", out, "--block", "32")
    refused("holds only pickle weights (pytorch_model.bin)", "inspect", dense)


def test_checkpoint_that_is_none(tmp_path, out):
    refused("does not exist", "prune", tmp_path / "absent", "--out", out)
    (tmp_path / "empty").mkdir()
    refused("has no config.json: it is not a checkpoint", "prune", tmp_path / "empty", "--out", out)


def test_code_in_a_checkpoint_is_not_run_unasked(dense, out):
    config = json.loads((dense / "config.json").read_text())
    config |= {"architectures": ["OwnModel"], "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "own.py").write_text("raise SystemExit('ran')")
    refused("pass --trust-remote-code", "prune", dense, "--out", out)


def test_model_with_nothing_to_prune(tmp_path, out):
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path / "convolutions"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder)
    refused("nothing is left to prune in ResNetModel", "prune", folder, "--out", out)


def test_existing_output_is_replaced_only_by_force(clean, tmp_path, out):
    assert invoke("prune", clean, "--out", out, "--block", "32").exit_code == 0
    before = checkpoints.digests(out)
    refused("exists: choose another folder, or pass --force", "prune", clean, "--out", out, "--block", "16")
    refused("is the checkpoint's own folder", "densify", out, "--out", out, "--force")
    assert checkpoints.digests(out) == before
    assert invoke("prune", clean, "--out", out, "--block", "16", "--force").exit_code == 0
    assert checkpoints.digests(out) != before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    refused("so it is not replaced", "prune", clean, "--out", other, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_unwritable_output(clean, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused("is a file: choose a folder", "prune", clean, "--out", tmp_path / "file", "--block", "32")
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # tests may run as root, who may write anywhere
    refused("cannot write to", "prune", clean, "--out", tmp_path / "out", "--block", "32")


def test_disk_too_small(clean, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused("its disk has 0 MB left", "prune", clean, "--out", tmp_path / "out", "--block", "32")
    refused("its disk has 0 MB left", "prune", clean, "--out", tmp_path / "out", "--block", "32", "--dry-run")


def test_densify_refuses_a_dense_checkpoint(clean, out):
    refused("is a dense checkpoint already", "densify", clean, "--out", out)


def test_eval_refuses_what_it_cannot_read(clean, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused("is empty", "eval", clean, "--data", empty)
    refused("does not exist", "eval", clean, "--data", tmp_path / "absent.txt")
    text = checkpoints.text(tmp_path)
    refused("a sample needs at least 2", "eval", clean, "--data", text, "--length", "1")
    labelled = checkpoints.labelled(tmp_path)
    refused("no column words", "eval", clean, "--data", labelled, "--column", "words")


@pytest.mark.parametrize("where", ["scoring", "writing"])
def test_ctrl_c_during_prune_leaves_nothing(clean, tmp_path, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "scoring":
        monkeypatch.setattr(PrunableLayer, "weight", property(interrupt))
    else:
        monkeypatch.setattr(
            writer, "_flush", interrupt
        )  # the files are written, the folder is not in place yet
    result = invoke("prune", clean, "--out", tmp_path / "out", "--block", "32")
    assert result.exit_code == INTERRUPTED
    assert result.stderr.strip().splitlines()[-1] == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_ctrl_c_in_training_then_resume_gives_the_same_bytes(clean, tmp_path):
    text = checkpoints.text(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {clean}\ndata: {{train: {{path: {text}, length: 64}}}}\nstages:\n"
        "  - {stage: prune, block: 32x32}\n"
        "  - {stage: finetune, steps: 300, batch: 4, save_steps: 20, heal: packed}\n"
        "  - {stage: convert}\n"
    )
    command = [sys.executable, "-m", "sparsify", "run", str(recipe), "--out"]
    subprocess.run([*command, str(tmp_path / "unbroken")], check=True, capture_output=True)

    # A shell that runs the tests in the background has them ignore SIGINT, and a child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    broken = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    work = tmp_path / "out.work"
    while not list(work.glob("1-trainer/checkpoint-*/trainer_state.json")):
        assert broken.poll() is None
        time.sleep(0.02)
    broken.send_signal(signal.SIGINT)
    _, said = broken.communicate()
    assert broken.returncode == INTERRUPTED
    assert "run the same command with --resume to go on" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()

    resumed = subprocess.run(
        [*command, str(tmp_path / "out"), "--resume"], check=True, capture_output=True, text=True
    )
    assert "going on from step" in resumed.stderr
    assert checkpoints.digests(tmp_path / "out") == checkpoints.digests(tmp_path / "unbroken")
    assert not work.exists()


def test_config_of_a_deeper_model(dense, out):
    config = json.loads((dense / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (dense / "config.json").write_text(json.dumps(config))
    refused("they would be random; is its config.json that of another model?", "prune", dense, "--out", out)
