"""The code in docs/pruners.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import sparsify
from sparsify import BlockShape
from sparsify.allocation.budget import Budget
from sparsify.calibration.statistics import collect_statistics
from sparsify.masking import mask_gradients, mask_model, unmask
from sparsify.pruner import available, create_pruner
from sparsify.targets import select

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pruners.md"
CODE = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.fixture
def model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def test_the_custom_pruner_is_fifteen_lines_and_works(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = CODE[0].partition("class ")[2].strip().splitlines()
    assert len(lines) <= 15
    (tmp_path / "my_pruners.py").write_text(CODE[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    pruner = create_pruner("my_pruners:Activity", attention=2.0)
    layers = select(model, BlockShape(32, 32)).layers
    collect_statistics(model, layers, pruner, [{"input_ids": torch.randint(0, 64, (2, 16))}])
    masks = Budget(0.5).masks({layer.name: pruner.score(layer) for layer in layers}, layers)
    assert (
        sum(mask.elements_kept for mask in masks.values())
        == sum(layer.weight.numel() for layer in layers) / 2
    )


def test_the_training_loop_is_six_lines_and_lands_on_the_target(model):
    assert len(CODE[1].strip().splitlines()) == 6
    ids = torch.randint(0, 64, (40, 2, 16))
    names = {
        "model": model,
        "batches": [{"input_ids": batch, "labels": batch} for batch in ids],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "create_pruner": create_pruner,
        "select": select,
        "BlockShape": BlockShape,
        "Budget": Budget,
    }
    exec(CODE[1], names)
    layers = names["layers"]
    pruner = names["pruner"]
    masks = names["budget"].masks({layer.name: pruner.score(layer) for layer in layers}, layers)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert zeros == sum(layer.weight.numel() for layer in layers) / 2
    assert not any(layer.weight[~masks[layer.name].elements()].any() for layer in layers)
    sparsify.apply(model, masks)
    assert model(ids[0]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["prune_and_grow", "movement"])
def test_the_training_loop_under_masks_lands_on_the_target(model, method: str):
    ids = torch.randint(0, 64, (20, 2, 16))
    names = {
        "model": model,
        "batches": [{"input_ids": batch, "labels": batch} for batch in ids],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "create_pruner": create_pruner,
        "select": select,
        "BlockShape": BlockShape,
        "Budget": Budget,
        "mask_model": mask_model,
        "mask_gradients": mask_gradients,
    }
    exec(next(code for code in CODE if "pruner.masks" in code).replace("prune_and_grow", method), names)
    masks = unmask(model)
    kept = sum(mask.elements_kept for mask in masks.values())
    assert kept == sum(layer.weight.numel() for layer in names["layers"]) / 2
    assert not any(layer.weight[~masks[layer.name].elements()].any() for layer in names["layers"])


def test_the_stack_of_patterns_is_built_and_mixes():
    code = next(code for code in CODE if "pattern_mask" in code)
    names: dict = {}
    exec(code, names)
    assert names["depth"] == 4 and all(layer.density == 0.25 for layer in names["layers"])


def test_every_registered_pruner_has_a_section():
    assert all(f"\n## `{name}`\n" in DOCS.read_text() for name in available())
