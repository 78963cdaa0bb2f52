"""What of a model can be divided, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import sparsify
from sparsify.errors import ConfigError
from sparsify.parallel.plan import groups

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 208,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def llama(block: str | None = None, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    if block:
        sparsify.prune(model, block=block, sparsity=0.5)
    return model


@pytest.mark.parametrize(
    ("block", "heads", "features"),
    # A key-value head has 8 rows of k and v, and 16 of q and columns of o.
    [(None, 1, 16), ("8x8", 1, 8), ("16x8", 2, 16), ("8x32", 2, 32), ("16x16", 2, 16)],
)
def test_units_stay_together_where_a_block_holds_several(block: str | None, heads: int, features: int):
    model = llama(block)
    found, whole = groups(model, model.tp_plan, 2)
    assert not whole
    attention, mlp = found
    assert (attention.units, attention.granule, attention.equal) == (4, heads, True)
    assert (mlp.units, mlp.granule, mlp.equal) == (208, features, False)
    assert attention.layers["model.layers.0.self_attn.q_proj"] == ("outputs", 16)
    assert attention.layers["model.layers.0.self_attn.o_proj"] == ("inputs", 16)
    for group in found:
        stored = sum(model.get_submodule(name).weight.numel() for name in group.layers)  # pyright: ignore
        assert sum(group.costs(model)) == stored


def test_blocks_over_all_heads_keep_an_attention_whole():
    model = llama("32x32")
    found, whole = groups(model, model.tp_plan, 2)
    assert [group.module for group in found] == ["model.layers.0.mlp"]
    assert whole == {
        "model.layers.0.self_attn": "4 key-value heads, 4 of which share blocks, cannot be divided among 2 ranks"
    }


def test_experts_stay_whole():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    found, whole = groups(model, model.tp_plan, 2)
    assert [group.module for group in found] == ["model.layers.0.self_attn"]
    assert whole and all("experts" in why for why in whole.values())


def test_what_is_between_the_layers_must_be_of_one_head():
    model = llama()
    attention: Any = model.model.layers[0].self_attn
    attention.q_norm = nn.LayerNorm(64)
    _, whole = groups(model, model.tp_plan, 2)
    assert whole == {"model.layers.0.self_attn": "it has parameters for all key-value heads together"}
    attention.q_norm = nn.LayerNorm(8)
    found, whole = groups(model, model.tp_plan, 2)
    assert not whole and found[0].inner == (
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_norm.bias",
    )


def test_unknown_modules_stay_whole():
    model = llama()

    class Other(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.up_proj(x).flip(-1))

    mlp: Any = model.model.layers[0].mlp
    mlp.__class__ = Other
    _, whole = groups(model, model.tp_plan, 2)
    assert whole == {
        "model.layers.0.mlp": "it is neither an attention with head_dim nor an MLP that is known"
    }


def test_one_process_is_told_what_is_needed():
    with pytest.raises(ConfigError, match="several processes are needed: launch with torchrun"):
        sparsify.parallelize(llama("16x16"))
