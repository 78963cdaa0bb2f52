"""Swapping layers of every kind inside real models, and describing them for a checkpoint."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.layers import kinds
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.swap import convert, masks_of, sparse_modules

BLOCK = BlockShape(32, 16)


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=1, n_head=3, vocab_size=50, n_positions=32))


def _mixtral():
    sizes = {"hidden_size": 80, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4}
    routing = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
    return MixtralForCausalLM(MixtralConfig(**sizes, **routing, head_dim=20))


def _gpt_oss():
    sizes = {"hidden_size": 80, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4}
    routing = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **routing, head_dim=20))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter)
    return model


def _zeroed(model, share=0.5):
    """Prunes every layer at random by zeros and returns the masks."""
    masks = {}
    for name, module in list(model.named_modules()):
        skipped = "head" in name or "router" in name or name.rsplit(".", 1)[-1] == "gate"
        if skipped or isinstance(module, nn.Embedding):
            continue
        for layer in kinds.matrices(name, module, BLOCK):
            mask = BlockMask(torch.rand(layer.grid) < share, layer.shape, BLOCK)
            layer.weight.mul_(mask.elements())
            masks[layer.name] = mask
    return masks


@pytest.mark.parametrize(
    "make", [_gpt2, _mixtral, _gpt_oss], ids=["conv1d", "experts", "transposed_biased_experts"]
)
def test_converted_model_computes_the_same_and_trains_the_same(make):
    model = make().eval()
    masks = _zeroed(model)
    ids = torch.randint(0, 50, (2, 11))
    expected = model(ids, labels=ids)
    expected.loss.backward()
    embedding = model.get_input_embeddings()
    dense_grad, embedding.weight.grad = embedding.weight.grad, None
    convert(model, masks)
    actual = model(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    actual.loss.backward()
    torch.testing.assert_close(embedding.weight.grad, dense_grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is not None for m in sparse_modules(model).values() for p in m.parameters())
    found = masks_of(model)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name].keep, masks[name].keep) for name in masks)


@pytest.mark.parametrize(
    "make", [_gpt2, _mixtral, _gpt_oss], ids=["conv1d", "experts", "transposed_biased_experts"]
)
def test_dense_parameters_restore_the_original_layout(make):
    model = make()
    masks = _zeroed(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, masks)
    for module_name, module in sparse_modules(model).items():
        for name, tensor in kinds.dense_parameters(module).items():
            assert torch.equal(tensor, state[f"{module_name}.{name}"])


@pytest.mark.parametrize(
    "make", [_gpt2, _mixtral, _gpt_oss], ids=["conv1d", "experts", "transposed_biased_experts"]
)
def test_build_from_the_entry_takes_the_state(make):
    model = make()
    dense = dict(make().named_modules())
    convert(model, _zeroed(model))
    for name, module in sparse_modules(model).items():
        built = kinds.build(name, dense[name].to("meta"), kinds.entry(module))
        assert all(p.is_meta for p in built.parameters())
        built.load_state_dict(module.state_dict(), assign=True)
        assert type(built) is type(module)
        assert kinds.entry(built) == kinds.entry(module)
        assert torch.equal(
            built.topology(next(iter(built.packed))).t_row, module.topology(next(iter(module.packed))).t_row
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "conv1d"}, "it is a conv1d layer there, the model has Linear"),
        ({"shape": [70, 101]}, r"its shape is \[70, 101\] there, the model has \[70, 100\]"),
        ({"block_shape": [48, 48]}, "power of two"),
        ({"blocks": 10_000}, "it has 10000 blocks, expected 0 to 20"),
        ({"blocks": "7"}, "it has 7 blocks"),
    ],
)
def test_build_refuses_an_entry_that_does_not_fit(change, message):
    entry = {"kind": "linear", "shape": [70, 100], "block_shape": [16, 32], "blocks": 7}
    linear = nn.Linear(100, 70, device="meta")
    assert kinds.build("up_proj", linear, entry).weight.shape == (7, 32, 16)
    with pytest.raises(CheckpointError, match=message):
        kinds.build("up_proj", linear, entry | change)


def test_what_can_be_swapped():
    class Own(nn.Linear):
        pass

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = nn.MultiheadAttention(16, 2)
    assert kinds.dense_kind(nn.Linear(4, 4)) == kinds.dense_kind(Own(4, 4)) == "linear"
    assert kinds.dense_kind(nn.LayerNorm(4)) is None and kinds.why_unsupported(nn.LayerNorm(4)) is None
    for module, reason in [(Doubling(4, 4), "Doubling computes"), (attention.out_proj, "MultiheadAttention")]:
        assert kinds.dense_kind(module) is None and reason in kinds.why_unsupported(module)
    assert kinds.dense_kind(BlockSparseLinear(16, 16, 8)) is None


def test_partly_masked_experts_keep_the_rest_whole():
    model = _mixtral().eval()
    name, experts = next((n, m) for n, m in model.named_modules() if kinds.dense_kind(m) == "experts")
    layer = kinds.matrices(name, experts, BLOCK)[2]
    masks = {layer.name: BlockMask.full(layer.shape, BLOCK, value=False)}
    layer.weight.zero_()
    ids = torch.randint(0, 50, (1, 9))
    expected = model(ids).logits
    convert(model, masks)
    sparse = model.get_submodule(name)
    assert isinstance(sparse, BlockSparseExperts)
    assert [sparse.mask_of("gate_up_proj", i).density for i in range(4)] == [1, 1, 0, 1]
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_masks_without_a_weight_are_an_error_and_change_nothing():
    model = _gpt2()
    masks = _zeroed(model)
    with pytest.raises(SparsifyError, match="no dense weight of the model: nowhere"):
        convert(model, masks | {"nowhere": next(iter(masks.values()))})
    assert not sparse_modules(model)
