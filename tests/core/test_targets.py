"""Which layers a pattern means, on real architectures built from small configs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError, TargetError
from sparsify.targets import KeptDense, select

BLOCK = BlockShape(32, 32)
SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options: object) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": True, **SMALL, **options},
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=96, n_layer=2, n_head=4, **SMALL))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=200, **SMALL
    )
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=96, d_kv=24, d_ff=200, num_layers=2, num_heads=4, **SMALL)
    return transformers.T5ForConditionalGeneration(config)


def mixtral(**options: object) -> nn.Module:
    config = transformers.MixtralConfig(
        **{
            "hidden_size": 96,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            **SMALL,
            **options,
        }
    )
    return transformers.MixtralForCausalLM(config)


def clip() -> nn.Module:
    tower = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**tower, **SMALL}, vision_config={**tower, "image_size": 32, "patch_size": 8}
        )
    )


def names(model: nn.Module, **options: object) -> list[str]:
    return [layer.name for layer in select(model, BLOCK, **options).layers]  # pyright: ignore


@pytest.mark.parametrize(
    ("build", "inside", "per_block"),
    [
        (llama, ["model.layers"], 7),
        (gpt2, ["transformer.h"], 4),
        (bert, ["bert.encoder.layer"], 6),
        (t5, ["encoder.block", "decoder.block"], 8),  # 6 in an encoder's block, 10 in a decoder's
        (mixtral, ["model.layers"], 4 + 2 * 4),
        (clip, ["text_model.encoder.layers", "vision_model.encoder.layers"], 6),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_patterns_every_layer_of_the_repeated_blocks_is_meant(build, inside, per_block):
    model = build()
    selection = select(model, BLOCK)
    assert len(selection.layers) == per_block * 2 * len(inside)
    assert all(layer.name.startswith(tuple(inside)) for layer in selection.layers)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n.startswith(tuple(inside))
    )
    other = sum(
        p.numel()
        for n, p in model.named_parameters()
        if n.startswith(tuple(inside)) and n.endswith(("relative_attention_bias.weight", "mlp.gate.weight"))
    )
    assert selection.elements == matrices - other
    assert not any(kept.name.startswith(tuple(inside)) for kept in selection.dense)


def test_layers_show_the_weight_as_out_by_in():
    model = gpt2()
    layer = next(layer for layer in select(model, BLOCK).layers if layer.name.endswith("c_fc"))
    module = model.get_submodule(layer.module_name)
    assert module.weight.shape == (96, 384)
    assert layer.shape == layer.weight.shape == (384, 96)
    assert layer.grid == (12, 3) and layer.module_class == "Conv1D"
    layer.weight[5, 7] = 3.0
    assert module.weight[7, 5] == 3.0


def test_experts_show_one_matrix_each():
    model = mixtral()
    layers = {layer.name: layer for layer in select(model, BLOCK, ["re:experts"]).layers}
    layer = layers["model.layers.1.mlp.experts.down_proj.2"]
    fused = model.get_submodule(layer.module_name).down_proj
    assert layer.shape == (96, 112) and fused.shape == (4, 96, 112)
    layer.weight.zero_()
    assert not fused[2].any() and fused[1].all()


def test_an_exact_name_means_a_layer_or_all_inside_a_module():
    model = llama()
    assert names(model, targets=["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert names(model, targets=["model.layers.1.mlp"]) == [
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert len(names(model, targets=["model.layers.1"])) == 7  # and not model.layers.10 in a deeper model
    assert names(mixtral(), targets=["model.layers.0.mlp.experts.down_proj.3"]) == [
        "model.layers.0.mlp.experts.down_proj.3"
    ]


def test_a_regular_expression_is_searched_for_in_the_name():
    model = llama()
    assert names(model, targets=["re:q_proj|k_proj"]) == [
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj")
    ]
    assert names(model, targets=[r"re:^model\.layers\.0\.mlp$"]) == names(
        model, targets=["model.layers.0.mlp"]
    )


def test_a_class_name_means_modules_of_the_class_and_of_classes_derived_from_it():
    class Scaled(nn.Linear):
        pass

    model = llama()
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = Scaled(128, 200, bias=False)
    assert names(model, targets=["Scaled"]) == ["model.layers.0.mlp.up_proj"]
    assert len(names(model, targets=["Linear"])) == 14
    assert len(names(model, targets=["LlamaMLP"])) == 6
    assert len(names(model, targets=["GradientCheckpointingLayer"])) == 14
    assert len(names(gpt2(), targets=["Conv1D"])) == 8


def test_ignored_layers_stay_dense_and_are_listed():
    selection = select(llama(), BLOCK, ["LlamaMLP"], ["re:layers.0", "model.layers.1.mlp.up_proj"])
    assert [layer.name for layer in selection.layers] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    ]
    reasons = {kept.name: kept.reason for kept in selection.dense}
    assert reasons["model.layers.1.mlp.up_proj"] == "ignored"
    assert reasons["model.layers.1.self_attn.q_proj"] == "not among the targets"


def test_a_tied_output_embedding_is_listed_and_refused_by_name():
    model = llama(tie_word_embeddings=True)
    reason = "shares its weight with model.embed_tokens"
    assert KeptDense("lm_head", (96, 128), reason) in select(model, BLOCK).dense
    assert KeptDense("lm_head", (96, 128), reason) in select(model, BLOCK, ["Linear"]).dense
    with pytest.raises(TargetError, match=f"'lm_head' cannot be pruned: it {reason}.*untie"):
        select(model, BLOCK, ["lm_head"])


def test_an_untied_output_embedding_is_pruned_only_if_named():
    model = llama(tie_word_embeddings=False)
    reasons = {kept.name: kept.reason for kept in select(model, BLOCK, ["Linear"]).dense}
    assert reasons == {"lm_head": "output embedding; name it to prune it"}
    assert names(model, targets=["lm_head"]) == names(model, targets=["re:head"]) == ["lm_head"]


def test_a_module_used_in_two_places_stays_dense():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = self.first
            self.third = nn.Linear(64, 64)

    selection = select(Twice(), BLOCK)
    assert [layer.name for layer in selection.layers] == ["third"]
    assert selection.dense == [KeptDense("first", (64, 64), "shares its weight with second")]


def test_a_layer_smaller_than_one_block_stays_dense_and_is_listed():
    selection = select(llama(), BlockShape(128, 128))
    assert {layer.name.rpartition(".")[2] for layer in selection.layers} == {
        *("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    small = [kept for kept in selection.dense if "smaller" in kept.reason]
    assert [kept.name.rpartition(".")[2] for kept in small] == ["k_proj", "v_proj"] * 2
    assert small[0] == KeptDense(
        "model.layers.0.self_attn.k_proj", (64, 128), "smaller than one block of 128x128"
    )


def test_experts_with_one_projection_too_small_stay_dense_as_one_entry():
    selection = select(mixtral(intermediate_size=48, hidden_size=128), BlockShape(64, 64))
    reason = "smaller than one block of 64x64"
    assert KeptDense("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 128), reason) in selection.dense
    assert KeptDense("model.layers.0.mlp.experts.down_proj", (4, 128, 48), reason) in selection.dense
    assert all("self_attn" in layer.name for layer in selection.layers)


def test_a_model_without_repeated_blocks_gives_all_but_its_output_embedding():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
            self.head = nn.Linear(64, 100)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert names(Head()) == ["body.0", "body.2"]


def test_what_looks_prunable_but_is_not_is_listed():
    class Odd(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).square()

    model = nn.ModuleList([Odd(64, 64), nn.Linear(64, 64), nn.MultiheadAttention(64, 2)])
    selection = select(model, BLOCK)
    assert [layer.name for layer in selection.layers] == ["1"]
    assert [(kept.name, kept.shape) for kept in selection.dense] == [
        ("0", (64, 64)),
        ("2.out_proj", (64, 64)),
    ]
    with pytest.raises(
        TargetError, match=r"'0' holds no layer that can be pruned: .*Odd computes something other"
    ):
        select(model, BLOCK, ["0"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layers.1.mlp.up_porj", "matches nothing: the nearest names are .*up_proj"),
        ("LLamaMLP", "matches nothing: the nearest names are LlamaMLP"),
        ("q_proj", r"'model.layers.0.self_attn.q_proj'; for all write 're:q_proj'"),
        ("re:qkv_proj", "matches nothing: the nearest names are .*q_proj"),
        ("re:(", r"'re:\(' is not a regular expression: "),
        ("Module", "matches nothing"),
        ("", "matches nothing"),
        ("model.norm", "model.norm is of class LlamaRMSNorm; what can be pruned are linear layers"),
        ("LlamaRMSNorm", "holds no layer that can be pruned: .* is of class LlamaRMSNorm"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(key, pattern, message):
    options = {"targets": None, key: [pattern]}
    with pytest.raises(TargetError, match=message) as caught:
        select(llama(), BLOCK, **options)
    assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


def test_a_model_in_which_nothing_can_be_pruned_is_an_error():
    with pytest.raises(TargetError, match="nothing in Sequential can be pruned"):
        select(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), BLOCK)
    with pytest.raises(TargetError, match=r"layers.0.self_attn.q_proj stays dense \(smaller than one block"):
        select(llama(), BlockShape(256, 256))
    with pytest.raises(TargetError, match=r"stays dense \(ignored\), and 14 more"):
        select(llama(), BLOCK, None, ["Linear", "re:."])
