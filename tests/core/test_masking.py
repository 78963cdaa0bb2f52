"""Masks in the forward pass of dense layers: what the model, the optimizer, the pruner and a checkpoint see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import CheckpointError, ConfigError
from sparsify.masking import current_masks, load_masks, mask_gradients, mask_model, save_masks, unmask
from sparsify.pruner import create_pruner
from sparsify.targets import select

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **SMALL
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **SMALL,
    )
    return transformers.MixtralForCausalLM(config)


MODELS = pytest.mark.parametrize("build", [llama, gpt2, mixtral], ids=lambda build: build.__name__)


def make_masks(model: nn.Module, sparsity: float = 0.5, block: str = "32x16") -> dict[str, BlockMask]:
    layers = select(model, BlockShape.parse(block)).layers
    pruner = create_pruner("magnitude")
    return Budget(sparsity, "layer").masks({layer.name: pruner.score(layer) for layer in layers}, layers)


def zeroed(model: nn.Module, masks: dict[str, BlockMask]) -> nn.Module:
    """A copy with zeros written into its weights: what a masked model must equal."""
    other = copy.deepcopy(model)
    for layer in select(other, next(iter(masks.values())).block).layers:
        layer.weight[~masks[layer.name].elements()] = 0.0
    return other


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 12))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@MODELS
def test_the_forward_pass_is_that_of_a_model_with_zeros(build: Callable[[], nn.Module]):
    model = build().eval()
    masks, ids = make_masks(model), tokens()
    expected = zeroed(model, masks)(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, expected)
    mask_model(model, masks)
    assert torch.equal(model(input_ids=ids).logits, expected)


@MODELS
def test_gradients_are_those_of_the_effective_weight_pruned_blocks_included(build):
    model = build()
    masks, ids = make_masks(model), tokens()
    dense = zeroed(model, masks)
    loss_of(dense, ids).backward()
    mask_model(model, masks)
    loss_of(model, ids).backward()
    for (name, expected), (_, got) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name
    for layer in select(model, BlockShape(32, 16)).layers:
        assert layer.grad is not None and layer.grad[~masks[layer.name].elements()].any()
    mask_gradients(model)
    for layer in select(model, BlockShape(32, 16)).layers:
        kept = masks[layer.name].elements()
        assert layer.grad is not None and not layer.grad[~kept].any() and layer.grad[kept].any()


def test_without_dense_gradient_pruned_blocks_get_none():
    model, ids = llama(), tokens()
    masks = make_masks(model)
    dense = zeroed(model, masks)
    loss_of(dense, ids).backward()
    mask_model(model, masks, dense_gradient=False)
    loss_of(model, ids).backward()
    for layer, other in zip(
        select(model, BlockShape(32, 16)).layers, select(dense, BlockShape(32, 16)).layers, strict=True
    ):
        assert torch.equal(layer.grad, other.grad * masks[layer.name].elements())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("hide", [True, False], ids=["gradients hidden", "gradients left"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@MODELS
def test_no_optimizer_moves_pruned_weights_off_zero(build, optimizer, hide):
    model = build()
    steps = OPTIMIZERS[optimizer](model.parameters())

    def step() -> None:
        for _ in range(2):  # two micro-batches
            loss_of(model, tokens()).backward()
        if hide:
            mask_gradients(model)
        steps.step()
        steps.zero_grad()

    step()  # momentum from before the mask
    masks = make_masks(model)
    mask_model(model, masks)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step()
    after = model.state_dict()
    for layer in select(model, BlockShape(32, 16)).layers:
        kept = masks[layer.name].elements()
        key = next(name for name, p in model.named_parameters() if p is layer.parameter)
        new, old = (
            state[key] if layer.index is None else state[key][layer.index] for state in (after, before)
        )
        new, old = (new.t(), old.t()) if layer.transposed else (new, old)
        assert not new[~kept].any()
        assert not torch.equal(new[kept], old[kept])


@MODELS
def test_a_checkpoint_written_while_masked_is_an_ordinary_one(build, tmp_path: Path):
    model = build()
    plain_keys = set(model.state_dict())
    masks, ids = make_masks(model), tokens()
    mask_model(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, ids).backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert set(model.state_dict()) == plain_keys
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for layer in select(loaded, BlockShape(32, 16)).layers:
        kept = masks[layer.name].elements()
        assert not layer.weight[~kept].any() and not torch.signbit(layer.weight[~kept]).any()


def test_a_state_dict_loads_into_a_masked_model():
    source, model, ids = llama().eval(), llama().eval(), tokens()
    masks = make_masks(model)
    mask_model(model, masks)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(input_ids=ids).logits, zeroed(source, masks)(input_ids=ids).logits)
    assert all(torch.equal(mask.keep, masks[name].keep) for name, mask in current_masks(model).items())


@MODELS
def test_unmask_writes_the_zeros_and_leaves_no_trace(build):
    model = build().eval()
    keys, buffers = set(vars(model)), len(list(model.buffers()))
    masks, ids = make_masks(model), tokens()
    mask_model(model, masks)
    expected = model(input_ids=ids).logits
    returned = unmask(model)
    assert current_masks(model) == {} and returned.keys() == masks.keys()
    assert all(torch.equal(returned[name].keep, masks[name].keep) for name in masks)
    assert all(returned[name].block == masks[name].block for name in masks)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert set(vars(model)) == keys and len(list(model.buffers())) == buffers
    loss_of(model, ids).backward()  # gradients of a dense model again
    for layer in select(model, BlockShape(32, 16)).layers:
        assert not layer.weight[~masks[layer.name].elements()].any()


def test_masking_keeps_the_weights_until_unmask_so_that_a_mask_may_change():
    model, ids = llama().eval(), tokens()
    before, full = model(input_ids=ids).logits, make_masks(model, 0.0)
    mask_model(model, make_masks(model, 0.9))
    assert not torch.equal(model(input_ids=ids).logits, before)
    mask_model(model, full)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool):
    model, ids = llama().train(), tokens()
    mask_model(model, make_masks(model))
    loss_of(model, ids).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss_of(model, ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@MODELS
def test_autocast_computes_in_bfloat16_with_the_mask(build):
    model, ids = build(), tokens()
    masks = make_masks(model)
    dense = zeroed(model, masks)
    mask_model(model, masks)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = dense(input_ids=ids).logits, model(input_ids=ids).logits
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
    got.float().square().mean().backward()
    assert all(layer.grad.dtype == torch.float32 for layer in select(model, BlockShape(32, 16)).layers)


@MODELS
def test_a_copy_is_masked_by_itself(build):
    model, ids = build().eval(), tokens()
    masks = make_masks(model)
    mask_model(model, masks)
    other = copy.deepcopy(model)
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    unmask(model)
    assert current_masks(other).keys() == masks.keys()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    unmask(other)
    for layer in select(other, BlockShape(32, 16)).layers:
        kept = masks[layer.name].elements()
        assert not layer.weight[~kept].any() and layer.weight[kept].all()


def test_the_mask_follows_the_model_to_another_dtype():
    model, ids = llama().eval(), tokens()
    masks = make_masks(model)
    mask_model(model, masks)
    model.to(torch.bfloat16)
    assert model(input_ids=ids).logits.dtype == torch.bfloat16
    assert {b.dtype for name, b in model.named_buffers() if name.endswith("_keep")} == {torch.bool}


def test_a_masked_model_trains_in_one_compiled_graph_that_new_masks_leave_valid():
    model = nn.Sequential(nn.Linear(40, 72), nn.ReLU(), nn.Linear(72, 24))
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for dense_gradient in (True, True, False):
        masks = {
            "0": BlockMask(torch.rand(5, 5) > 0.5, (72, 40), BlockShape(16, 8)),
            "2": BlockMask(torch.rand(2, 9) > 0.5, (24, 72), BlockShape(16, 8)),
        }
        mask_model(model, masks, dense_gradient)
        x, found = torch.randn(5, 40), []
        for run in (model, compiled):
            model.zero_grad()
            outputs = run(x)
            outputs.square().sum().backward()
            found.append([outputs, *(parameter.grad for parameter in model.parameters())])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert all(isinstance(model[index].weight, nn.Parameter) for index in (0, 2))
    assert len(graphs) == 2  # the second one without gradients of pruned blocks


def test_an_error_in_the_forward_pass_leaves_the_parameter_in_place():
    layer = nn.Sequential(nn.Linear(16, 16))
    mask_model(layer, {"0": BlockMask.full((16, 16), BlockShape(8, 8), False)})
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 3))
    assert isinstance(layer[0].weight, nn.Parameter) and layer[0].weight.any()


def test_a_replica_of_data_parallel_is_masked_too():
    layer = nn.Linear(16, 16)
    mask_model(layer, {"": BlockMask.full((16, 16), BlockShape(8, 8), False)})
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():  # what torch.nn.parallel.replicate does
        setattr(replica, name, parameter.clone())
    assert torch.equal(replica(torch.ones(2, 16)), layer.bias.expand(2, 16))


def test_all_empty_and_all_full_masks():
    layer, x = nn.Sequential(nn.Linear(20, 12)), torch.randn(3, 20)
    block = BlockShape(8, 8)
    mask_model(layer, {"0": BlockMask.full((12, 20), block, False)})
    assert torch.equal(layer(x), layer[0].bias.expand(3, 12))
    mask_model(layer, {"0": BlockMask.full((12, 20), block, True)})
    assert torch.equal(layer(x), functional_call(nn.Linear(20, 12), dict(layer[0].named_parameters()), x))


def test_masks_that_fit_no_layer_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    block = BlockShape(8, 8)
    with pytest.raises(ConfigError, match="cannot mask '1': the model has no dense layer"):
        mask_model(model, {"0": BlockMask.full((16, 16), block), "1": BlockMask.full((16, 16), block)})
    with pytest.raises(
        ConfigError, match=r"cannot mask 0: its weight is \(16, 16\), the mask is for \(16, 24\)"
    ):
        mask_model(model, {"0": BlockMask.full((16, 24), block)})
    assert current_masks(model) == {}


def test_experts_of_one_weight_share_a_block_shape():
    model, name = mixtral(), "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ConfigError, match="masks of different block shapes"):
        mask_model(
            model,
            {
                f"{name}.0": BlockMask.full((48, 56), BlockShape(8, 8)),
                f"{name}.1": BlockMask.full((48, 56), BlockShape(16, 8)),
            },
        )


def test_masks_go_to_a_file_and_back(tmp_path: Path):
    masks = make_masks(llama())
    save_masks(tmp_path / "masks.safetensors", masks)
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(loaded[name].keep, mask.keep)
        assert (loaded[name].shape, loaded[name].block) == (mask.shape, mask.block)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_damaged_mask_file_is_refused(tmp_path: Path, damage: str):
    path = tmp_path / "masks.safetensors"
    if damage == "truncated":
        save_masks(path, make_masks(llama()))
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other":
        from safetensors.torch import save_file

        save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"cannot read block masks from .*masks\.safetensors"):
        load_masks(path)
