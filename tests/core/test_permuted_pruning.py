"""Pruning that orders units first: nothing but the order changes, and what it gained is told."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify import masking, pipeline
from sparsify.errors import ConfigError
from sparsify.recipe.schema import Recipe
from sparsify.symmetries import symmetries
from sparsify.training.pruning_callback import PruningCallback
from tests.architectures.zoo import ARCHITECTURES
from tests.cli import checkpoints
from tests.core.test_pipeline import Notes


def scattered(name: str):
    """A model of whose units every other one is zero, inputs for it, and the modules that have such units."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, modules = architecture.build(), set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that every part shows in the output
        for symmetry in symmetries(model):
            for axis in symmetry.axes:
                axis.tensor.index_fill_(axis.dim, axis.positions[::2], 0)
                if axis.tensor.dim() == 2:
                    modules.add(axis.name.partition(".experts.")[0] + ".experts" * (".experts." in axis.name))
    return model.eval(), architecture.batch(), sorted(modules)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "qwen3-moe"])
def test_empty_units_come_together_and_go_without_a_trace(name):
    model, batch, modules = scattered(name)
    before = logits(model, batch)
    result = sparsify.prune(model, block="8x8", sparsity=0.45, targets=modules, permute=True, convert=False)
    assert result.sparsity == pytest.approx(0.45, abs=0.01)
    assert all(own.after == pytest.approx(1) and own.before < 0.9 for own in result.permuted)
    assert (logits(model, batch) - before).abs().max() < 1e-5 * before.abs().max()
    model, batch, modules = scattered(name)
    sparsify.prune(model, block="8x8", sparsity=0.45, targets=modules, convert=False)
    assert (logits(model, batch) - before).abs().max() > 1e-2 * before.abs().max()


def test_units_that_show_in_no_selected_weight_stay():
    model, _, _ = scattered("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = sparsify.permute(model, "8x8", 0.45, weights={"model.layers.0.mlp.down_proj"})
    assert [own.name for own in result] == ["model.layers.0.mlp"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_a_model_under_a_mask_is_not_reordered():
    model, batch, _ = scattered("llama")
    masks = sparsify.prune(model, block="8x8", sparsity=0.2, targets=["re:down_proj"], convert=False).masks
    masking.mask_model(model, masks)
    before = logits(model, batch)
    with pytest.raises(ConfigError, match=r"down_proj is pruned already, and its mask would no longer fit"):
        sparsify.prune(model, block="8x8", sparsity=0.5, targets=["re:up_proj"], permute=True)
    assert torch.equal(logits(model, batch), before)
    sparsify.prune(model, block="8x8", targets=["re:self_attn"], permute=True, convert=False)


@pytest.fixture
def make(tmp_path):
    dense = checkpoints.llama(tmp_path / "dense")
    data = {"path": str(checkpoints.text(tmp_path)), "length": 32, "samples": 32}

    def make(*stages: dict, out: str = "out") -> Recipe:
        values = {"version": 1, "model": str(dense), "out": str(tmp_path / out), "stages": list(stages)}
        return Recipe.from_dict({**values, "data": dict.fromkeys(("train", "eval", "calibration"), data)})

    return make


ORDERED = {"block": "8x8", "sparsity": 0.5, "permute": True}
PRUNE = {"stage": "prune", **ORDERED}
CALIBRATE = {"stage": "calibrate", "samples": 8, "batch": 4}
SEARCH = {"stage": "finetune", "steps": 4, "batch": 4, "save_steps": 2}


def test_a_recipe_reports_what_the_order_gained(make, tmp_path):
    notes = Notes()
    pipeline.run(make(PRUNE, {"stage": "convert"}, {"stage": "report"}), progress=notes)
    report = json.loads((tmp_path / "out" / "sparsify_report.json").read_text())
    (gained,) = report["permuted"]
    assert gained["stage"] == 0 and gained["symmetries"] == 6 and gained["moved"] > 0
    assert 0.5 < gained["before"] < gained["after"] < 1
    assert f"kept hold {gained['after']:.1%} of their squared weight" in notes.lines[0]
    # Packed and loaded again, it is the reordered model without the removed blocks.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    sparsify.permute(model, "8x8", 0.5)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, mask in sparsify.masks_of(stored).items():
        model.get_submodule(name).weight.data.mul_(mask.elements())
    batch = {"input_ids": torch.arange(5, 45)[None]}
    torch.testing.assert_close(logits(stored, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "task", "step"),
    [
        ([CALIBRATE, {**PRUNE, "method": "block_obs"}], "adjusting weights", 1),
        ([PRUNE, {**SEARCH, "heal": "masked"}], "training", 3),
        ([{**SEARCH, "pruner": {**ORDERED, "method": "movement"}}], "training", 3),
        ([CALIBRATE, {**SEARCH, "pruner": {**ORDERED, "scope": "outlier"}}], "training", 3),
    ],
    ids=["walks", "healing", "search", "search with statistics"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(make, tmp_path, stages, task, step):
    stages = [*stages, {"stage": "convert"}, {"stage": "report"}]
    pipeline.run(make(*stages, out="whole"))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(make(*stages), progress=Notes(task, step))
    result = pipeline.run(make(*stages), resume=True)
    assert checkpoints.digests(tmp_path / "out") == checkpoints.digests(tmp_path / "whole")
    assert result.report is not None and len(result.report["permuted"]) == 1


def test_statistics_are_collected_in_the_new_order(make, tmp_path, monkeypatch):
    """What calibration saw of a layer's inputs lies in the order that the layer has when it is pruned."""
    seen, begin = {}, PruningCallback.on_train_begin

    def collect(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        seen.update(
            {layer.name: (layer.weight.clone(), layer.statistics["input_sq"]) for layer in self.layers}
        )

    monkeypatch.setattr(PruningCallback, "on_train_begin", collect)
    search = {**SEARCH, "pruner": {**ORDERED, "scope": "outlier"}}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(make(CALIBRATE, search), progress=Notes("training", 1))
    name = "model.layers.0.mlp.down_proj"
    weight, used = seen[name]
    old = dense.get_submodule(name).weight.detach()
    order = (weight.t()[:, None] - old.t()[None]).abs().sum(2).argmin(1)
    assert not torch.equal(order, torch.arange(len(order))) and torch.equal(weight, old[:, order])
    inputs = []
    dense.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    text = (tmp_path / "text.txt").read_text()
    ids = AutoTokenizer.from_pretrained(tmp_path / "dense")(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        dense(ids[:, :256])
    mean = inputs[0].square().mean((0, 1))[order]
    assert torch.corrcoef(torch.stack([mean, used]))[0, 1] > 0.95


def test_the_second_pruning_of_a_layer_cannot_reorder(make, tmp_path):
    with pytest.raises(ConfigError, match=r"stage 1 cannot reorder units: .* is pruned by stage 0 already"):
        pipeline.run(make({**PRUNE, "permute": False}, PRUNE))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="up_proj is pruned already"):
        pipeline.run(make({**PRUNE, "targets": "re:up_proj"}, {**PRUNE, "targets": "re:down_proj"}))


def test_a_model_without_known_symmetries_says_so(tmp_path):
    architecture = next(a for a in ARCHITECTURES if a.name == "phi3")
    architecture.build().save_pretrained(tmp_path / "phi3")
    notes = Notes()
    stages = [{"stage": "prune", "block": "16x16", "permute": True}]
    pipeline.run(
        Recipe.from_dict(
            {"version": 1, "model": str(tmp_path / "phi3"), "out": str(tmp_path / "out"), "stages": stages}
        ),
        progress=notes,
    )
    assert "no units are known that could change places" in notes.lines[0]
