"""Layers that are nearly, but not quite, an `nn.Linear`; and models that do not fit the pattern."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from sparsify.allocation.budget import allocate
from sparsify.blocks import BlockShape
from sparsify.checkpoint import writer
from sparsify.errors import TargetError
from sparsify.layers.swap import convert, sparse_modules
from sparsify.pruner import create_pruner
from sparsify.targets import select
from tests.architectures.zoo import BY_NAME, DECODER, VISION, prune


class NamedLinear(nn.Linear):
    """A subclass that adds nothing to the forward pass, as tensor-parallel and adapter code brings along."""


def test_linear_subclass_is_pruned(tmp_path: Path) -> None:
    model = BY_NAME["llama"].build()
    old = model.model.layers[0].mlp.up_proj
    new = NamedLinear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[0].mlp.up_proj = new
    masks, _ = prune(model, "32x32")
    assert "model.layers.0.mlp.up_proj" in masks
    want = model(**BY_NAME["llama"].batch()).logits
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert "model.layers.0.mlp.up_proj" in sparse_modules(loaded)
    torch.testing.assert_close(loaded(**BY_NAME["llama"].batch()).logits, want)


def test_attention_module_of_torch_keeps_working(tmp_path: Path) -> None:
    """SigLIP pools with `nn.MultiheadAttention`, which reads `out_proj.weight` without calling the layer."""
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)).eval()
    block = BlockShape(32, 32)
    selection = select(model, block, targets=["Linear"])
    out_proj = next(kept for kept in selection.dense if kept.name.endswith("attention.out_proj"))
    assert "MultiheadAttention" in out_proj.reason
    assert any(layer.name.endswith("head.mlp.fc1") for layer in selection.layers)
    pruner = create_pruner("magnitude")
    scores = {layer.name: pruner.score(layer) for layer in selection.layers}
    masks = allocate(scores, selection.layers, 0.5, "layer")
    for layer in selection.layers:
        layer.weight.mul_(masks[layer.name].elements())
    pixels = torch.randn(2, 3, 32, 32)
    want = model(pixels).pooler_output
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "sparse")
    torch.testing.assert_close(loaded(pixels).pooler_output, want)


def test_layer_smaller_than_a_block_stays_dense_and_is_listed(tmp_path: Path) -> None:
    """One key head of 32 features under blocks of 64 rows."""
    config = hf.LlamaConfig(**{**DECODER, "num_key_value_heads": 1})
    model = hf.LlamaForCausalLM(config).eval()
    masks, selection = prune(model, "64x32")
    small = [kept for kept in selection.dense if "smaller than one block" in kept.reason]
    assert {kept.name.rpartition(".")[2] for kept in small} == {"k_proj", "v_proj"}
    assert {kept.shape for kept in small} == {(32, 192)}
    batch = BY_NAME["llama"].batch()
    want = model(**batch).logits
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert isinstance(loaded.model.layers[0].self_attn.k_proj, nn.Linear)
    torch.testing.assert_close(loaded(**batch).logits, want)


def test_model_in_which_nothing_can_be_pruned_is_an_error() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, "hidden_size": 96, "intermediate_size": 64}))
    with pytest.raises(TargetError, match="smaller than one block of 128x128"):
        prune(model, "128x128")


def test_only_some_experts_pruned(tmp_path: Path) -> None:
    """Experts of one layer packed, those of the other dense: each finds its own names in the file."""
    case = BY_NAME["mixtral"]
    model = case.build()
    masks, _ = prune(model, case.block)
    masks = {name: mask for name, mask in masks.items() if "layers.1.mlp.experts" in name}
    batch = case.batch()
    want = model(**batch).logits
    convert(model, masks)
    assert list(sparse_modules(model)) == ["model.layers.1.mlp.experts"]
    writer.save(model, tmp_path / "sparse")
    loaded, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(loaded(**batch).logits, want)
