"""Several prunings of one model: by two stages, before a search, or of a source that is block-sparse in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify import pipeline
from sparsify.checkpoint.reader import open_checkpoint
from sparsify.layers.swap import masks_of, sparse_modules
from sparsify.recipe.schema import Recipe
from tests.cli import checkpoints

ATTENTION = {"stage": "prune", "block": "16x16", "sparsity": 0.5, "targets": ["re:self_attn"]}
FEED_FORWARD = {"stage": "prune", "block": "32x32", "sparsity": 0.5, "targets": ["re:mlp"]}
CONVERT = {"stage": "convert"}
REPORT = {"stage": "report"}


@pytest.fixture
def run(tmp_path):
    """Runs stages on the dense Llama, or on a checkpoint that an earlier run wrote."""
    dense, text = checkpoints.llama(tmp_path / "dense"), checkpoints.text(tmp_path)

    def run(*stages: dict[str, Any], out: str, source: str = "dense") -> pipeline.RunResult:
        data = {"train": {"path": str(text), "length": 32, "samples": 32}}
        values = {"version": 1, "model": str(dense.with_name(source)), "out": str(tmp_path / out)}
        return pipeline.run(Recipe.from_dict({**values, "data": data, "stages": list(stages)}))

    return run


def blocks_on_disk(folder: Path) -> dict[str, tuple[str, float]]:
    """Block shape and density of each layer that is stored block-sparse."""
    return {layer.name: (str(layer.block), layer.density) for layer in open_checkpoint(folder).layers}


def check_halves(found: dict[str, tuple[str, float]]) -> None:
    assert len(found) == 14
    for name, (block, _) in found.items():
        assert block == ("16x16" if "self_attn" in name else "32x32")
    for part in ("self_attn", "mlp"):
        densities = [density for name, (_, density) in found.items() if part in name]
        assert sum(densities) / len(densities) == pytest.approx(0.5, abs=0.1)


def test_two_prune_stages_are_both_packed(run, tmp_path):
    result = run(ATTENTION, FEED_FORWARD, CONVERT, REPORT, out="out")
    check_halves(blocks_on_disk(tmp_path / "out"))
    assert {layer["name"] for layer in result.report["layers"]} == set(masks_of(result.model))
    assert {kept["name"] for kept in result.report["kept_dense"]}.isdisjoint(sparse_modules(result.model))


def test_source_that_is_sparse_in_part_is_pruned_in_the_rest(run, tmp_path):
    run(FEED_FORWARD, CONVERT, out="part")
    result = run(ATTENTION, CONVERT, REPORT, out="out", source="part")
    check_halves(blocks_on_disk(tmp_path / "out"))
    before, after = (
        masks_of(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("part", "out")
    )
    assert all(torch.equal(mask.keep, after[name].keep) for name, mask in before.items())
    assert all(layer["bytes"] < layer["bytes_dense"] for layer in result.report["layers"])


@pytest.mark.parametrize("heal", ["auto", "packed", "masked"])
def test_source_that_is_sparse_in_part_heals(run, tmp_path, heal):
    run(FEED_FORWARD, CONVERT, out="part")
    train = {"stage": "finetune", "steps": 1, "batch": 4, "heal": heal}
    run(ATTENTION, train, CONVERT, out="out", source="part")
    check_halves(blocks_on_disk(tmp_path / "out"))


def test_search_leaves_what_was_pruned_before_at_zero(run, tmp_path):
    run(ATTENTION, CONVERT, out="before")
    search = {"method": "group_lasso", "block": "32x32", "sparsity": 0.5, "targets": ["re:mlp"]}
    train = {"stage": "finetune", "steps": 3, "batch": 4, "learning_rate": 1e-2, "pruner": search}
    run(ATTENTION, train, CONVERT, out="out")
    check_halves(blocks_on_disk(tmp_path / "out"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("before", "out"))
    for name, mask in masks_of(before).items():
        assert torch.equal(mask.keep, masks_of(after)[name].keep)
        assert not torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)
