"""Whole runs: what each stage does to the model, what is written, and what an interruption leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsify import pipeline
from sparsify.checkpoint import reader
from sparsify.errors import CheckpointError, ConfigError, DataError, OutputError, SparsifyError, TargetError
from sparsify.layers.swap import masks_of, sparse_modules
from sparsify.recipe.schema import Recipe
from sparsify.runtime.progress import Progress
from tests.cli import checkpoints
from tests.cli.checkpoints import digests

PRUNE = {"stage": "prune", "block": "32x32", "sparsity": 0.5}
SEARCHES = ["group_lasso", "movement", "prune_and_grow"]
TRAIN = {"stage": "finetune", "steps": 6, "batch": 4, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoints.llama(tmp_path_factory.mktemp("dense"))


def recipe_maker(folder: Path, dense: Path) -> Callable[..., Recipe]:
    """Makes recipes for the dense Llama from stages, by name or in full, with their text and output in `folder`."""
    text = str(checkpoints.text(folder))

    def make(*stages: str | dict, out: str = "out", **keys: Any) -> Recipe:
        listed = [{"stage": stage} if isinstance(stage, str) else stage for stage in stages]
        data = {
            name: {"path": text, "length": 32, "samples": 32} for name in ("train", "eval", "calibration")
        }
        values = {
            "version": 1,
            "model": str(dense),
            "out": str(folder / out),
            "data": data,
            "stages": listed,
        }
        return Recipe.from_dict({**values, **keys})

    return make


@pytest.fixture
def make(tmp_path, dense):
    return recipe_maker(tmp_path, dense)


def healing_stages(heal: str) -> list[str | dict]:
    return ["evaluate", PRUNE, {**TRAIN, "save_steps": 2, "heal": heal}, "convert", "report"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, dense):
    """Digests of what `healing_stages` write in one go, by the way of healing; each is run once."""

    @cache
    def run(heal: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp(heal)
        pipeline.run(recipe_maker(folder, dense)(*healing_stages(heal)))
        return digests(folder / "out")

    return run


class Notes(Progress):
    """Keeps notes; presses Ctrl-C at a given step of a given task."""

    def __init__(self, task: str = "", step: int = 0) -> None:
        self.lines: list[str] = []
        self._stop = task, step

    def note(self, text: str) -> None:
        self.lines.append(text)

    def task(self, label, total=None):
        return _Task(step=self._stop[1] if label == self._stop[0] else None)


class _Task:
    def __init__(self, step: int | None) -> None:
        self._step, self._done = step, 0.0

    def __enter__(self):
        if self._step == 0:
            raise KeyboardInterrupt
        return self._advance

    def __exit__(self, *error) -> None:
        pass

    def _advance(self, count: float = 1, *, total: float | None = None, text: str = "") -> None:
        self._done += count
        if self._step is not None and self._done >= self._step:
            raise KeyboardInterrupt


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def zeroed(dense: Path, masks: dict) -> torch.Tensor:
    """Logits of the dense model with the blocks outside `masks` set to zero."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    for name, mask in masks.items():
        model.get_submodule(name).weight.data.mul_(mask.elements())
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def test_one_shot_writes_a_smaller_whole_checkpoint(make, dense, tmp_path):
    result = pipeline.run(make("evaluate", PRUNE, "evaluate", "convert", "evaluate", "report"))
    out = tmp_path / "out"
    assert result.out == out
    assert not (tmp_path / "out.work").exists()

    loaded = AutoModelForCausalLM.from_pretrained(out)
    masks = masks_of(loaded)
    assert len(masks) == 14
    torch.testing.assert_close(logits(out), zeroed(dense, masks), rtol=1e-4, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("fox")["input_ids"] == checkpoints.tokenizer()("fox")["input_ids"]
    )

    report = json.loads((out / "sparsify_report.json").read_text())
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["totals"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert {layer["name"]: layer["density"] for layer in report["layers"]} == pytest.approx(
        {name: mask.density for name, mask in masks.items()}
    )
    assert [(kept["name"], kept["reason"]) for kept in report["kept_dense"]] == [
        ("lm_head", "shares its weight with model.embed_tokens")
    ]
    # Measured twice under one label, before packing and after: the later measurement stays.
    first, last = report["columns"]["dense"], report["columns"]["pruned"]
    assert last["bytes"] == pytest.approx(report["totals"]["bytes"], rel=0.02)
    assert last["bytes"] < 0.65 * first["bytes"] and last["parameters"] < 0.65 * first["parameters"]
    assert last["quality"]["perplexity"] > 0 and set(last["latency"]) == {"1", "256"}
    assert last["peak_memory"] > last["bytes"]
    assert Recipe.load(out / "sparsify_recipe.yaml") == Recipe.from_dict(report["recipe"])


def test_dense_conversion_writes_zeros_under_ordinary_names(make, dense, tmp_path):
    pipeline.run(make(PRUNE, "convert", out="sparse"))
    pipeline.run(make(PRUNE, {"stage": "convert", "format": "dense"}))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    masks = masks_of(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not sparse_modules(plain)
    for name, mask in masks.items():
        assert torch.equal(plain.get_submodule(name).weight != 0, mask.elements())
    torch.testing.assert_close(logits(tmp_path / "out"), zeroed(dense, masks), rtol=0, atol=0)


@pytest.mark.parametrize("heal", ["packed", "masked"])
def test_healing_trains_kept_blocks_alone(make, tmp_path, heal):
    pipeline.run(make(PRUNE, "convert", out="pruned"))
    result = pipeline.run(make(PRUNE, "evaluate", {**TRAIN, "heal": heal}, "convert", "evaluate", "report"))
    before, after = (
        masks_of(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("pruned", "out")
    )
    assert all(torch.equal(before[name].keep, after[name].keep) for name in before)
    assert result.report is not None
    columns = result.report["columns"]
    assert list(columns) == ["pruned", "recovered"]
    assert columns["recovered"]["quality"]["loss"] < columns["pruned"]["quality"]["loss"] - 0.3
    (history,) = result.report["history"]
    assert history["stage"] == 2 and history["points"][-1]["step"] == 6
    assert history["points"][-1]["loss"] < history["points"][0]["loss"]


def test_packed_and_masked_healing_learn_the_same(make, tmp_path):
    train = {**TRAIN, "steps": 3, "trainer": {"max_grad_norm": 0.0}}
    for heal in ("packed", "masked"):
        pipeline.run(make(PRUNE, {**train, "heal": heal}, "convert", out=heal))
    torch.testing.assert_close(logits(tmp_path / "packed"), logits(tmp_path / "masked"), rtol=1e-3, atol=1e-3)


def test_heal_auto_says_what_it_took_and_why(make):
    notes = Notes()
    result = pipeline.run(make(PRUNE, {**TRAIN, "steps": 1}, "convert", "report"), progress=notes)
    assert any("heal: auto trains" in line and "ms packed" in line for line in notes.lines)
    assert result.report is not None and result.report["notes"] == notes.lines


def test_heal_auto_is_masked_where_the_result_is_dense(make, tmp_path):
    notes = Notes()
    dense_form = {"stage": "convert", "format": "dense"}
    result = pipeline.run(make(PRUNE, {**TRAIN, "steps": 1}, dense_form), progress=notes)
    assert notes.lines == ["heal: auto trains masked weights: the result is to be dense"]
    assert not sparse_modules(result.model)
    weight = result.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert 0.2 < float((weight == 0).float().mean()) < 0.9


def test_a_search_that_ends_early_trains_on_under_its_masks(make):
    search = {"method": "movement", "block": "32x32", "sparsity": 0.6, "until": 0.5}
    result = pipeline.run(
        make("evaluate", {**TRAIN, "steps": 8, "pruner": search}, "convert", "evaluate", "report")
    )
    assert result.report is not None
    assert result.report["totals"]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert list(result.report["columns"]) == ["dense", "recovered"]


def test_calibration_reaches_a_custom_pruner(make, tmp_path, monkeypatch):
    (tmp_path / "activation_pruner.py").write_text(
        "from sparsify import Pruner\n"
        "from sparsify.blocks import to_blocks\n"
        "class Activations(Pruner):\n"
        "    requires = frozenset({'input_sq'})\n"
        "    def score(self, layer):\n"
        "        scaled = layer.weight * layer.statistics['input_sq'].sqrt()\n"
        "        return to_blocks(scaled, layer.block).square().sum((2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    custom = {**PRUNE, "method": "activation_pruner:Activations"}
    with pytest.raises(ConfigError, match=r"needs the statistic 'input_sq'.*put a calibrate stage before it"):
        pipeline.run(make(custom, "convert"))
    result = pipeline.run(make({"stage": "calibrate", "samples": 8, "batch": 4}, custom, "convert"))
    assert len(sparse_modules(result.model)) == 14
    sys.modules.pop("activation_pruner")


def test_an_interrupted_second_order_pruning_goes_on_and_ends_with_the_same_bytes(make, tmp_path):
    stages = [
        {"stage": "calibrate", "samples": 8, "batch": 4},
        {**PRUNE, "method": "block_obs"},
        "convert",
        "report",
    ]
    with pytest.raises(pipeline.Interrupted, match="run the same command with --resume"):
        pipeline.run(make(*stages), progress=Notes("adjusting weights", 1))
    scores = tmp_path / "sparsify-scores"
    stored = {file: file.stat().st_mtime_ns for file in scores.rglob("*") if file.is_file()}
    assert len(stored) == 3  # scores of both transformer blocks, adjusted weights of the first
    pipeline.run(make(*stages), resume=True)
    pipeline.run(make(*stages, out="whole"))
    assert checkpoints.digests(tmp_path / "out") == checkpoints.digests(tmp_path / "whole")
    left = {file: file.stat().st_mtime_ns for file in scores.rglob("*") if file.is_file()}
    assert len(left) == 2 and left.items() < stored.items()


def test_bfloat16_weights_are_trained_in_float32_and_stay_bfloat16(tmp_path, make):
    source = checkpoints.llama(tmp_path / "bf16", torch.bfloat16)
    result = pipeline.run(
        make(
            PRUNE,
            {**TRAIN, "heal": "packed", "precision": "bfloat16"},
            "convert",
            "report",
            model=str(source),
        )
    )
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.report is not None
    losses = [point["loss"] for point in result.report["history"][0]["points"]]
    assert losses[-1] < losses[0] - 0.3
    assert result.model.config.use_cache  # the Trainer turns it off while it trains


@pytest.mark.parametrize(
    ("source", "data", "task", "metric"),
    [
        (checkpoints.bert_masked, checkpoints.text, "auto", "perplexity"),
        (checkpoints.bert_classifier, checkpoints.labelled, "auto", "accuracy"),
        (checkpoints.bert, checkpoints.pairs, "sentence-embedding", "spearman"),
    ],
    ids=["masked-lm", "sequence-classification", "sentence-embedding"],
)
def test_encoders_of_every_task_are_trained_and_scored(tmp_path, source, data, task, metric):
    spec = {"path": str(data(tmp_path)), "length": 24, "samples": 32}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "model": str(source(tmp_path / "dense")),
            "out": str(tmp_path / "out"),
            "task": task,
            "data": {"train": spec, "eval": spec},
            "stages": [
                PRUNE,
                {**TRAIN, "steps": 32, "batch": 8, "learning_rate": 1e-3},
                {"stage": "convert"},
                {"stage": "evaluate"},
                {"stage": "report"},
            ],
        }
    )
    result = pipeline.run(recipe)
    assert result.report is not None
    assert metric in result.report["columns"]["recovered"]["quality"]
    losses = [point["loss"] for point in result.report["history"][0]["points"]]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert sparse_modules(reader.load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("task", "step", "heal"),
    [
        ("scoring blocks", 3, "packed"),
        ("training", 1, "masked"),
        ("training", 5, "masked"),
        ("training", 5, "packed"),
        ("packing blocks", 0, "masked"),
        ("packing blocks", 0, "packed"),
        ("writing out", 0, "masked"),
    ],
)
def test_interrupted_run_resumes_to_the_same_bytes(make, tmp_path, unbroken, task, step, heal):
    recipe = make(*healing_stages(heal))
    label = f"writing {recipe.out}" if task.startswith("writing") else task
    with pytest.raises(KeyboardInterrupt, match="run the same command with --resume to go on"):
        pipeline.run(recipe, progress=Notes(label, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work", "text.txt"]
    notes = Notes()
    pipeline.run(recipe, resume=True, progress=notes)
    if (task, step) == ("training", 5):
        assert "going on from step 4 of the finetune stage" in notes.lines
    assert digests(tmp_path / "out") == unbroken(heal)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("method", SEARCHES)
def test_interrupted_search_resumes_to_the_same_bytes_and_the_exact_sparsity(make, tmp_path, method: str):
    search = {"method": method, "block": "32x32", "sparsity": 0.5}
    stages = [
        {**TRAIN, "accumulate": 2, "save_steps": 2, "pruner": search},
        {**TRAIN, "steps": 1, "heal": "packed"},
        "convert",
        "report",
    ]
    pipeline.run(make(*stages, out="unbroken"))
    recipe = make(*stages)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, progress=Notes("training", 5))
    result = pipeline.run(recipe, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "unbroken")
    assert result.report is not None
    assert result.report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_interrupted_one_shot_leaves_nothing(make, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        pipeline.run(make(PRUNE, "convert"), progress=Notes("scoring blocks", 3))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_leftovers_are_neither_dropped_nor_mixed_in_silence(make, tmp_path):
    stages = ["evaluate", PRUNE, {**TRAIN, "save_steps": 2}, "convert"]
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(make(*stages), progress=Notes("training", 5))
    with pytest.raises(
        OutputError, match="left from an interrupted run: go on with --resume, or start over with --force"
    ):
        pipeline.run(make(*stages))
    with pytest.raises(ConfigError, match="left by a run with other settings"):
        pipeline.run(make(*stages, seed=1), resume=True)
    (tmp_path / "out.work" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        pipeline.run(make(*stages), resume=True)
    pipeline.run(make(*stages), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_resume_without_leftovers_says_so_and_runs(make, tmp_path):
    notes = Notes()
    pipeline.run(make("evaluate", PRUNE, "convert"), resume=True, progress=notes)
    assert "nothing to resume: starting from the beginning" in notes.lines
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, ConfigError, "names no model: give --model"),
        ({"out": None}, ConfigError, "names no output folder: give --out"),
        ({"device": "cuda:9"}, ConfigError, "device 'cuda:9' cannot be used"),
        ({"device": "warp"}, ConfigError, "device 'warp' cannot be used"),
        ({"model": "/no/such/checkpoint"}, CheckpointError, "does not exist"),
        ({"data": {"train": {"path": "/no/such/file.txt"}}}, DataError, "does not exist"),
        ({"stages": [{**PRUNE, "targets": ["q_porj"]}]}, TargetError, "matches nothing.*q_proj"),
        ({"stages": [{**PRUNE, "block": 256}]}, TargetError, "smaller than one block"),
    ],
    ids=[
        "no-model",
        "no-out",
        "no-gpu",
        "no-device",
        "no-checkpoint",
        "no-data",
        "no-target",
        "nothing-prunable",
    ],
)
def test_faults_are_found_before_weights_are_loaded(make, monkeypatch, tmp_path, change, error, message):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(reader, "load", load)
    values = make(PRUNE, TRAIN, "convert").model_dump(mode="json", exclude_none=True)
    with pytest.raises(error, match=message):
        pipeline.run(Recipe.from_dict({**values, **change}))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_disk_space_is_checked_for_output_and_work_folder(make, monkeypatch, tmp_path):
    free = {"bytes": 0}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free["bytes"]))
    with pytest.raises(OutputError, match=r"needs about \d+ MB, but its disk has 0 MB left"):
        pipeline.run(make(PRUNE, "convert"))
    free["bytes"] = 40 * 10**6  # enough for the checkpoint, not for what training keeps beside it
    with pytest.raises(OutputError, match="needs about"):
        pipeline.run(make(PRUNE, {**TRAIN, "heal": "packed"}, "convert"))
    pipeline.run(make(PRUNE, "convert"))


def test_refuses_to_write_over_its_own_source(make, dense):
    recipe = make(PRUNE, "convert")
    with pytest.raises(OutputError, match="is the model's own folder"):
        pipeline.run(recipe.model_copy(update={"out": str(dense)}), force=True)


def test_diverging_training_stops_with_the_step(make):
    wild = {
        **TRAIN,
        "steps": 60,
        "learning_rate": 1e30,
        "warmup": 0,
        "heal": "masked",
        "trainer": {"max_grad_norm": 0.0},
    }
    with pytest.raises(
        SparsifyError, match=r"training diverged: the loss is (nan|inf) at step \d+; lower learning_rate"
    ):
        pipeline.run(make(PRUNE, wild, "convert"))


def test_model_of_no_known_task_can_be_pruned_but_not_trained(tmp_path, make):
    source = checkpoints.bert(tmp_path / "bert")
    with pytest.raises(ConfigError, match="the finetune stage must know what BertModel is for: set `task`"):
        pipeline.run(make(PRUNE, TRAIN, "convert", model=str(source)))
    pipeline.run(make(PRUNE, "convert", model=str(source)))


def test_block_sparse_source_can_be_healed_further(make, tmp_path):
    pipeline.run(make(PRUNE, "convert", out="sparse"))
    source = str(tmp_path / "sparse")
    result = pipeline.run(make("evaluate", TRAIN, "evaluate", "report", model=source, out="healed"))
    assert result.report is not None
    columns = result.report["columns"]
    assert columns["recovered"]["quality"]["loss"] < columns["pruned"]["quality"]["loss"]
    first, second = (
        masks_of(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("sparse", "healed")
    )
    assert all(torch.equal(first[name].keep, second[name].keep) for name in first) and len(second) == 14
    with pytest.raises(TargetError):
        pipeline.run(make(PRUNE, "convert", model=source, out="again"))


def test_evaluation_alone_writes_nothing(make, tmp_path):
    result = pipeline.run(make("evaluate", "report"))
    assert result.out is None and result.report is not None
    assert "perplexity" in str(result)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
