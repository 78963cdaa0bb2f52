"""The inputs that calibration shows a pruner, on real architectures: padding left out, experts apart."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsify.blocks import BlockShape
from sparsify.calibration.statistics import collect_statistics, needs_calibration
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.targets import select

BLOCK = BlockShape(8, 8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Recorder(Pruner):
    """Keeps everything it is shown."""

    def calibrate(self, layer: PrunableLayer, inputs: Tensor) -> None:
        seen = layer.statistics.get("seen", inputs.new_zeros(0, inputs.shape[1]))
        layer.statistics["seen"] = torch.cat([seen, inputs])

    def score(self, layer: PrunableLayer) -> Tensor:
        return layer.statistics["seen"].new_zeros(layer.grid)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SMALL))


def padded(rows: int = 3, length: int = 10) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, 3:] = 0
    return {"input_ids": torch.randint(3, 64, (rows, length)), "attention_mask": mask}


def test_each_layer_is_shown_the_tokens_it_multiplies_without_padding():
    model, batches = llama(), [padded(), padded(2, 7)]
    layers = {layer.name: layer for layer in select(model, BLOCK).layers}
    collect_statistics(model, list(layers.values()), Recorder(), batches)
    count = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {len(layer.statistics["seen"]) for layer in layers.values()} == {count}
    first = layers["model.layers.0.self_attn.q_proj"]
    block = model.model.layers[0]
    expected = [
        block.input_layernorm(model.model.embed_tokens(batch["input_ids"]))[batch["attention_mask"].bool()]
        for batch in batches
    ]
    assert torch.equal(first.statistics["seen"], torch.cat(expected))


def test_tokens_of_a_right_padded_batch_are_those_of_the_sequences_alone():
    model, batch = llama(), padded()
    alone = [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(*batch.values(), strict=True)]
    seen = []
    for batches in ([batch], alone):
        layers = select(model, BLOCK).layers
        collect_statistics(model, layers, Recorder(), batches)
        seen.append(layers[-1].statistics["seen"])
    torch.testing.assert_close(seen[0], seen[1])


def test_the_model_is_left_as_it_was():
    model = llama().train()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    layers = select(model, BLOCK).layers
    collect_statistics(model, layers, Recorder(), [padded()])
    assert model.training and hooks == sum(len(m._forward_pre_hooks) for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError):
        collect_statistics(model, layers, Recorder(), [{"no_such_input": torch.ones(1)}])
    assert model.training and hooks == sum(len(m._forward_pre_hooks) for m in model.modules())


def test_gpt2_statistics_are_of_the_inputs_of_the_weights_columns():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    model, batch = transformers.GPT2LMHeadModel(config).eval(), padded()
    layers = {layer.name: layer for layer in select(model, BLOCK).layers}
    collect_statistics(model, list(layers.values()), Recorder(), [batch])
    assert layers["transformer.h.0.mlp.c_fc"].statistics["seen"].shape == (
        int(batch["attention_mask"].sum()),
        32,
    )
    assert layers["transformer.h.0.mlp.c_proj"].statistics["seen"].shape[1] == 128


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_each_expert_is_shown_the_tokens_routed_to_it(implementation: str):
    config = transformers.MixtralConfig(
        num_key_value_heads=2, num_local_experts=4, experts_implementation=implementation, **SMALL
    )
    model, batch = transformers.MixtralForCausalLM(config).eval(), padded()
    layers = {layer.name: layer for layer in select(model, BLOCK, ["re:experts"]).layers}
    calls: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule("model.layers.1.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append((args[0], args[1])))
    collect_statistics(model, list(layers.values()), Recorder(), [batch])
    handle.remove()
    (hidden, routed), valid = calls[0], batch["attention_mask"].bool().flatten()
    total = 0
    for expert in range(4):
        tokens = hidden[valid & (routed == expert).any(-1)]
        first = layers[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        second = layers[f"model.layers.1.mlp.experts.down_proj.{expert}"]
        assert torch.equal(first.statistics["seen"], tokens)
        gate, up = (tokens @ experts.gate_up_proj[expert].t()).chunk(2, -1)
        torch.testing.assert_close(second.statistics["seen"], nn.functional.silu(gate) * up)
        total += len(tokens)
    assert total == 2 * int(valid.sum())  # each token goes to two experts


def test_an_expert_without_tokens_has_statistics_of_zero():
    class Energy(Pruner):
        requires = frozenset({"input_sq"})

        def score(self, layer: PrunableLayer) -> Tensor:
            return layer.statistics["input_sq"].new_ones(layer.grid)

    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=8, **SMALL)
    model = transformers.MixtralForCausalLM(config)
    layers = select(model, BLOCK, ["re:experts"]).layers
    collect_statistics(model, layers, Energy(), [{"input_ids": torch.tensor([[5]])}])
    unused = [layer for layer in layers if not layer.statistics["tokens"]]
    assert len(unused) == 2 * 2 * 6  # layers, projections, experts that the one token did not reach
    assert all(not layer.statistics["input_sq"].any() for layer in unused)


def test_decoder_layers_use_the_decoders_mask():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    model, batch = transformers.T5ForConditionalGeneration(config), padded()
    decoder = {f"decoder_{name}": value for name, value in padded(3, 5).items()}
    layers = {layer.name: layer for layer in select(model, BLOCK).layers}
    collect_statistics(model, list(layers.values()), Recorder(), [{**batch, **decoder}])
    seen = {name: len(layer.statistics["seen"]) for name, layer in layers.items()}
    encoder_tokens = int(batch["attention_mask"].sum())
    assert seen["encoder.block.0.layer.0.SelfAttention.q"] == encoder_tokens
    assert seen["decoder.block.0.layer.1.EncDecAttention.k"] == encoder_tokens
    assert seen["decoder.block.0.layer.1.EncDecAttention.q"] == int(decoder["decoder_attention_mask"].sum())


def test_a_layer_that_no_batch_reaches_is_an_error():
    tower = {**SMALL, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=tower, vision_config={**SMALL, "image_size": 16, "patch_size": 8})
    ).text_model
    model.extra = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(PrunerError, match=r"layer extra\.0 saw no calibration input: give data"):
        collect_statistics(model, select(model, BLOCK).layers, Recorder(), [padded()])
    with pytest.raises(PrunerError, match=r"saw no calibration input, and \d+ more"):
        collect_statistics(model, select(model, BLOCK).layers, Recorder(), [])


def test_a_pruner_that_needs_nothing_costs_nothing():
    def never() -> object:
        raise AssertionError("the data was read")
        yield

    magnitude = create_pruner("magnitude")
    assert not needs_calibration(magnitude) and needs_calibration(Recorder())
    model = llama()
    collect_statistics(model, select(model, BLOCK).layers, magnitude, never())
