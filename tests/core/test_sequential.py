"""Walks through real architectures: the right inputs, little memory, and nothing done twice."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape, to_blocks
from sparsify.calibration.cache import WalkCache
from sparsify.calibration.sequential import prune_in_walks
from sparsify.calibration.statistics import collect_statistics
from sparsify.calibration.walk import Walk
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner, create_pruner
from sparsify.targets import select

BLOCK = BlockShape(8, 8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SMALL))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)
    )


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SMALL)
    return transformers.MixtralForCausalLM(config)


def gemma() -> nn.Module:
    """Blocks with different masks: sliding windows and full attention take turns."""
    config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **SMALL)
    return transformers.Gemma2ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def shared() -> nn.Module:
    """Blocks that one forward pass uses twice."""
    config = transformers.AlbertConfig(
        embedding_size=32, num_hidden_groups=2, **{**SMALL, "num_hidden_layers": 4}
    )
    return transformers.AlbertModel(config)


def plain() -> nn.Module:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 40), nn.Linear(40, 32)

        def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(nn.functional.one_hot(input_ids % 32, 32).float())))

    return Stack()


MODELS = [llama, bert, gpt2, mixtral, gemma, t5, shared, plain]
models = pytest.mark.parametrize("make", MODELS, ids=[make.__name__ for make in MODELS])


def batches(make, count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for index in range(count):
        mask = torch.ones(2, 9 + index, dtype=torch.int64)
        mask[0, 5:] = 0
        batch = {"input_ids": torch.randint(3, 64, mask.shape), "attention_mask": mask}
        if make is t5:
            batch["decoder_input_ids"] = torch.randint(3, 64, (2, 6))
        made.append(batch)
    return made


class Recorder(Pruner):
    """Keeps what it is shown; the first blocks of a weight are the best ones."""

    def calibrate(self, layer: PrunableLayer, inputs: Tensor) -> None:
        seen = layer.statistics.get("seen", inputs.new_zeros(0, inputs.shape[1]))
        layer.statistics["seen"] = torch.cat([seen, inputs])

    def score(self, layer: PrunableLayer) -> Tensor:
        return -torch.arange(layer.grid[0] * layer.grid[1], dtype=torch.float32).view(layer.grid)


class Updating(Recorder):
    """Halves what is kept, and keeps for the test what it was shown before that."""

    def __init__(self) -> None:
        self.shown: dict[str, Tensor] = {}

    def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
        self.shown[layer.name] = layer.statistics["seen"]
        layer.weight.mul_(0.5)


@models
def test_the_first_walk_sees_what_the_dense_model_computes(make):
    model, data = make().eval(), batches(make)
    expected = select(model, BLOCK).layers
    collect_statistics(model, expected, Recorder(), data)
    layers = select(model, BLOCK).layers
    with torch.no_grad(), Walk(model, layers, data) as walk:
        names = walk.names
        for block in walk:
            block.advance(Recorder())
    assert len(names) > 1 or make in (shared, plain)
    for one, other in zip(expected, layers, strict=True):
        torch.testing.assert_close(other.statistics["seen"], one.statistics["seen"], msg=one.name)


@models
def test_the_second_walk_sees_what_the_pruned_layers_before_give(make):
    model, data = make().eval(), batches(make)
    pruner, layers = Updating(), select(model, BLOCK).layers
    masks = prune_in_walks(model, pruner, layers, Budget(0.5, "layer"), data)
    after = select(model, BLOCK).layers
    collect_statistics(model, after, Recorder(), data)  # of the finished model
    for layer in after:
        assert not layer.weight[~masks[layer.name].elements()].any()
        if make in (shared, plain) and layer.module_name != "first":
            continue  # the whole model in the role of one block: fed by layers that were still to come
        torch.testing.assert_close(pruner.shown[layer.name], layer.statistics["seen"], msg=layer.name)


def test_layers_that_share_an_input_share_its_statistics():
    model, data = llama(), batches(llama)
    layers = {layer.name.rpartition(".")[2]: layer for layer in select(model, BLOCK, ["re:layers.0"]).layers}
    pruner = create_pruner("block_obs")
    with torch.no_grad(), Walk(model, list(layers.values()), data) as walk:
        first = next(iter(walk))
        groups = first.groups()
        first.show(pruner, first.layers)
    names = [[layer.name.rpartition(".")[2] for layer in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    hessians = {name: layer.statistics["hessian"].data_ptr() for name, layer in layers.items()}
    assert hessians["q_proj"] == hessians["v_proj"] and len(set(hessians.values())) == 4
    alone = select(model, BLOCK, ["re:layers.0.*v_proj"]).layers
    collect_statistics(model, alone, pruner, data)
    torch.testing.assert_close(alone[0].statistics["hessian"], layers["v_proj"].statistics["hessian"])


class Counting(Pruner):
    """Counts how many Hessians live at the same time."""

    requires = frozenset({"hessian"})

    def __init__(self) -> None:
        self.made: dict[int, weakref.ref[Tensor]] = {}
        self.most = 0

    def calibrate(self, layer: PrunableLayer, inputs: Tensor) -> None:
        super().calibrate(layer, inputs)
        hessian = layer.statistics["hessian"]
        self.made[id(hessian)] = weakref.ref(hessian)
        self.most = max(self.most, sum(made() is not None for made in self.made.values()))

    def score(self, layer: PrunableLayer) -> Tensor:
        return to_blocks(layer.weight, layer.block).square().sum((2, 3))


def test_statistics_are_of_one_block_and_activations_of_one_block(monkeypatch):
    model, data = llama(), batches(llama, 6)
    pruner, layers = Counting(), select(model, BLOCK).layers
    activations: list[int] = []
    run = type(model.model.layers[0]).forward

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        alive = [t for call in holder[0].calls for t in call.args if isinstance(t, Tensor)]
        alive += holder[0].outputs
        activations.append(sum(t.numel() for t in alive))
        return run(self, hidden_states, *args, **kwargs)

    tokens = sum(batch["input_ids"].numel() for batch in data)
    with torch.no_grad(), Walk(model, layers, data) as walk:
        holder: list = []
        for block in walk:
            if not holder:
                holder.append(block)
                monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
            holder[0] = block
            block.advance(pruner)
            for layer in block.layers:
                pruner.score(layer)
                layer.statistics.clear()
    assert pruner.most == 7  # of 21 layers
    assert max(activations) <= tokens * 32


def test_a_model_on_another_device_is_brought_there_block_by_block(monkeypatch):
    """cpu:0 stands for a GPU: the same weights, but another name."""
    model, data = llama(), batches(llama)
    names = {id(module): name for name, module in model.named_modules()}
    there: set[str] = set()
    most: list[int] = []
    move = nn.Module.to

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        (there.add if device.index == 0 else there.discard)(names[id(module)])
        most.append(len(there))
        return move(module, device)

    dense = {name: value.clone() for name, value in model.state_dict().items()}
    layers = select(model, BLOCK).layers
    walk = Walk(model, layers, data, "cpu:0")
    walk.streams = True
    monkeypatch.setattr(nn.Module, "to", to)
    with torch.no_grad(), walk:
        for block in walk:
            assert there == {block.name}
            block.advance(Recorder())
    assert max(most) == 1 and not there
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    expected = select(model, BLOCK).layers
    collect_statistics(model, expected, Recorder(), data)
    for one, other in zip(expected, layers, strict=True):
        torch.testing.assert_close(other.statistics["seen"], one.statistics["seen"])


def test_scores_are_reused_for_another_sparsity(tmp_path):
    cache, data = WalkCache(tmp_path), batches(llama)
    dense = llama()

    class Once(Recorder):
        scored: ClassVar[list[str]] = []

        def score(self, layer: PrunableLayer) -> Tensor:
            self.scored.append(layer.name)
            return super().score(layer)

    def prune(sparsity: float, data: list = data) -> dict[str, BlockMask]:
        model = llama()
        model.load_state_dict(dense.state_dict())
        return prune_in_walks(model, Once(), select(model, BLOCK).layers, Budget(sparsity), data, cache=cache)

    first = prune(0.5)
    assert len(Once.scored) == 21
    again, other = prune(0.5), prune(0.75)
    assert len(Once.scored) == 21
    assert all(torch.equal(first[name].keep, again[name].keep) for name in first)
    assert sum(mask.elements_kept for mask in other.values()) < sum(
        mask.elements_kept for mask in first.values()
    )
    prune(0.5, batches(llama, 2))  # other data
    dense.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1  # another model
    prune(0.5)
    assert len(Once.scored) == 63


@pytest.mark.parametrize("stop", range(1, 42, 8))
def test_an_interrupted_walk_goes_on_and_ends_the_same(tmp_path, stop):
    data, dense = batches(llama), llama()
    calls: list[str] = []

    class Stopped(create_pruner("block_obs").__class__):
        left = stop

        def _step(self) -> None:
            Stopped.left -= 1
            if not Stopped.left:
                raise KeyboardInterrupt

        def score(self, layer: PrunableLayer) -> Tensor:
            self._step()
            calls.append(layer.name)
            return super().score(layer)

        def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
            self._step()
            calls.append(layer.name)
            super().update_weights(layer, mask)

    def prune(cache: WalkCache | None) -> nn.Module:
        model = llama()
        model.load_state_dict(dense.state_dict())
        prune_in_walks(model, Stopped(), select(model, BLOCK).layers, Budget(0.5), data, cache=cache)
        return model

    with pytest.raises(KeyboardInterrupt):
        prune(WalkCache(tmp_path))
    done = len(calls)
    resumed = prune(WalkCache(tmp_path))
    repeated = len(calls) - 42
    assert done == stop - 1 and repeated == done % 7  # only those of the block that was in hand
    whole = prune(None)
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert len(list(tmp_path.iterdir())) == 1  # scores; the weights of finished blocks are gone


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path):
    cache, data = WalkCache(tmp_path), batches(llama)
    model = llama()
    layers = select(model, BLOCK).layers
    prune_in_walks(model, Recorder(), layers, Budget(0.0), data, cache=cache)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:50])
    prune_in_walks(model, Recorder(), layers, Budget(0.0), data, cache=cache)
    assert files[1].read_bytes() == whole


def test_the_model_is_left_in_its_mode():
    model = llama().train()
    prune_in_walks(model, create_pruner("wanda"), select(model, BLOCK).layers, Budget(0.5), batches(llama))
    assert model.training and model.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_calibration_is_named():
    model = llama()
    layers, pruner = select(model, BLOCK).layers, create_pruner("block_obs")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PrunerError, match="there is no calibration data"):
        prune_in_walks(model, pruner, layers, Budget(0.5), [])
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(PrunerError, match=r"inputs of layer model.layers.1.self_attn.q_proj hold NaN"):
        prune_in_walks(model, pruner, layers, Budget(0.5), batches(llama))
    model.model.layers[1].input_layernorm.weight.data[3] = 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.model.extra = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(PrunerError, match=r"layer model.extra.0 saw no calibration input"):
        prune_in_walks(model, pruner, select(model, BLOCK).layers, Budget(0.5), batches(llama))


class Comparing(Recorder):
    """Keeps for the test what `update_weights` gets to see, and scales what is kept."""

    compares = True

    def __init__(self) -> None:
        self.cross: dict[str, Tensor] = {}

    def update_weights(self, layer: PrunableLayer, mask: BlockMask) -> None:
        if layer.index is None:
            self.cross[layer.name] = layer.statistics["cross"]
        layer.weight.mul_(0.5)


@pytest.mark.parametrize("make", [llama, bert, gemma, mixtral], ids=["llama", "bert", "gemma", "mixtral"])
def test_cross_pairs_the_dense_models_inputs_with_those_of_the_pruned_one(make):
    model, data = make().eval(), batches(make)
    before = select(model, BLOCK).layers
    collect_statistics(model, before, Recorder(), data)
    pruner = Comparing()
    prune_in_walks(model, pruner, select(model, BLOCK).layers, Budget(0.5, "layer"), data)
    after = select(model, BLOCK).layers
    collect_statistics(model, after, Recorder(), data)
    for one, other in zip(before, after, strict=True):
        if one.index is None:
            dense, pruned = one.statistics["seen"], other.statistics["seen"]
            expected = dense.t() @ pruned / len(dense)
            torch.testing.assert_close(pruner.cross[one.name], expected, msg=one.name)
