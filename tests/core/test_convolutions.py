"""Convolutions on the whole way: targets, pruners, masking, conversion, checkpoints, and what stays dense and why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import sparsify
from sparsify import BlockShape
from sparsify.blocks import BlockMask
from sparsify.calibration.statistics import collect_statistics
from sparsify.checkpoint import reader
from sparsify.conv_weight import as_linear
from sparsify.errors import CheckpointError, TargetError
from sparsify.layers.swap import masks_of
from sparsify.masking import (
    current_masks,
    load_masks,
    mask_gradients,
    mask_model,
    save_masks,
    unmask,
)
from sparsify.pruner import available, create_pruner
from sparsify.stages.prune import restore_masks
from sparsify.targets import select

BLOCK = BlockShape(8, 16)


class Net(nn.Module):
    """Two residual blocks with everything that a convolution can be, between a stem and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(24, 40, 3, padding=1, bias=False),
                    nn.BatchNorm2d(40),
                    nn.ReLU(),
                    nn.Conv2d(40, 40, 3, padding=1, groups=40),
                    nn.Conv2d(40, 48, 1),
                ),
                nn.Sequential(
                    nn.Conv2d(48, 64, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(64, 24, (1, 3))
                ),
            ]
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 12, 14)


NAMES = ["blocks.0.0", "blocks.0.4", "blocks.1.0.group.0", "blocks.1.0.group.1", "blocks.1.2"]


def test_selection(net):
    found = select(net, BLOCK)
    assert [layer.name for layer in found.layers] == NAMES
    shapes = [(40, 216), (48, 40), (32, 216), (32, 216), (24, 192)]
    assert [layer.shape for layer in found.layers] == shapes
    assert [layer.grid for layer in found.layers] == [(5, 2), (6, 3), (4, 2), (4, 2), (3, 4)]
    reasons = {kept.name: kept.reason for kept in found.dense}
    assert reasons["blocks.0.3"].startswith("a depthwise convolution has one input channel a group")
    assert reasons["stem"] == "outside the repeated blocks"
    each = select(net, BLOCK, ["blocks.0.0"], None, per_position=True).layers
    assert [layer.name for layer in each] == [f"blocks.0.0.position.{p}" for p in range(9)]
    assert {layer.shape for layer in each} == {(40, 24)}
    assert [layer.name for layer in select(net, BLOCK, ["blocks.1.0"]).layers] == NAMES[2:4]
    with pytest.raises(TargetError, match=r"stem stays dense \(smaller than one block of 8x16\)"):
        select(net, BLOCK, ["stem"])


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


DENSE = {
    "3d": (nn.Conv3d(16, 16, 3), r"Conv3d: convolutions of one and two dimensions have a block-sparse"),
    "transposed": (nn.ConvTranspose2d(16, 16, 3), r"ConvTranspose2d: transposed convolutions have no"),
    "depthwise": (nn.Conv2d(16, 32, 3, groups=16), r"a depthwise convolution has one input channel a group"),
    "small_groups": (nn.Conv2d(32, 32, 3, groups=8), r"smaller than one block of 8x16"),
    "own_forward": (Own(16, 16, 3), r"Own computes something other than nn.Conv2d"),
    "lazy": (nn.LazyConv2d(16, 3), r"its shape is not known before the model has run once"),
    "computed": (nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), r"computed anew in each call"),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_cannot_be_pruned_is_told_in_one_line_and_left_alone(name):
    module, message = DENSE[name]
    model = nn.Sequential(module)
    before = repr(model)
    with pytest.raises(TargetError, match=message) as caught:
        sparsify.prune(model, block=BLOCK)
    assert "\n" not in str(caught.value) and repr(model) == before


def test_shared_weights_stay_dense():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    model[1].weight = model[0].weight
    found = select(model, BLOCK)
    assert [layer.name for layer in found.layers] == ["2"]
    assert [kept.reason for kept in found.dense] == ["shares its weight with 1", "shares its weight with 0"]
    with pytest.raises(TargetError, match=r"target '0' cannot be pruned: it shares its weight with 1"):
        select(model, BLOCK, ["0"])


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_pruned_sparse_and_pruned_dense_agree(net, images, per_position, last):
    if last:
        net = net.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(net)
    options = {"block": BLOCK, "sparsity": 0.5, "per_position": per_position}
    result = sparsify.prune(net, **options)
    sparsify.prune(dense, convert=False, **options)
    torch.testing.assert_close(net(images), dense(images))
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    weights = [dense.blocks[0][0], dense.blocks[0][4], dense.blocks[1][0], dense.blocks[1][2]]
    zeros = sum(int((conv.weight == 0).sum()) for conv in weights)
    assert zeros == pytest.approx(0.5 * sum(conv.weight.numel() for conv in weights), rel=0.05)
    masks = masks_of(net)
    assert masks.keys() == result.masks.keys()
    for name, mask in result.masks.items():
        assert torch.equal(masks[name].keep, mask.keep) and masks[name].block == mask.block


TRAINING = {"group_lasso", "movement", "prune_and_grow"}


@pytest.mark.parametrize("method", sorted(set(available()) - TRAINING))
def test_every_pruner_takes_convolutions(net, images, method):
    dense = copy.deepcopy(net)
    result = sparsify.prune(
        net, method=method, block=BLOCK, sparsity=0.4, calibration=[{"x": images}], reconstruct=0
    )
    assert set(result.masks) == set(NAMES)
    restore_masks(dense, result.masks)
    if not create_pruner(method).compensates:
        torch.testing.assert_close(net(images), dense(images))
    assert result.sparsity == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("method", sorted({*TRAINING, "magnitude"}))
def test_pruning_while_training(net, method):
    images, labels = torch.randn(32, 3, 12, 14), torch.arange(32) % 10
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    loop = sparsify.SparsifyLoop(
        net, optimizer, steps=40, method=method, block="8x16", sparsity=0.5, until=0.8
    )
    net.train()
    losses = []
    for _ in range(40):
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    masks = loop.finish(convert=False)
    assert set(masks) == set(NAMES) and losses[-1] < losses[0]
    kept = sum(mask.elements_kept for mask in masks.values())
    assert kept == pytest.approx(
        0.5 * sum(mask.shape[0] * mask.shape[1] for mask in masks.values()), rel=0.05
    )
    exact = net.eval()(images)
    sparsify.apply(net, masks)
    torch.testing.assert_close(net(images), exact)


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
def test_block_obs_and_reconstruction_bring_the_output_nearer(net, per_position):
    images = torch.randn(16, 3, 12, 14)
    wanted = net(images).detach()
    errors = {}
    for name, options in {
        "magnitude": {"method": "magnitude"},
        "block_obs": {"method": "block_obs"},
        "reconstructed": {"method": "block_obs", "reconstruct": 60},
    }.items():
        model = copy.deepcopy(net)
        batches = [{"x": part} for part in images.split(4)]
        sparsify.prune(
            model, block=BLOCK, sparsity=0.5, calibration=batches, per_position=per_position, **options
        )
        errors[name] = ((model(images) - wanted).norm() / wanted.norm()).item()
    assert errors["block_obs"] < errors["magnitude"]
    assert errors["reconstructed"] < errors["block_obs"]


CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "groups": nn.Conv2d(6, 8, (2, 3), stride=2, groups=2),
    "same_reflect": nn.Conv2d(6, 8, 4, padding="same", padding_mode="reflect", dilation=2),
    "one": nn.Conv1d(6, 8, 3, padding=2, dilation=2),
}


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_statistics_are_those_of_the_patches(name, per_position):
    """Inputs times weight is the output: what a pruner is shown are the columns of its matrix, in its order."""
    conv = CONVOLUTIONS[name]
    shown = {}

    class Shown(type(create_pruner("magnitude"))):
        def calibrate(self, layer, inputs):
            shown.setdefault(layer.name, []).append(inputs @ layer.weight.t())

    from sparsify.layers.kinds import matrices

    layers = matrices("0", conv, BlockShape(8, 8), per_position)
    x = torch.randn(3, 6, *(11, 9)[: len(conv.kernel_size)])
    collect_statistics(nn.Sequential(conv), layers, Shown(), [{"input": x}])
    parts = torch.stack([torch.cat(shown[layer.name]) for layer in layers])  # [matrices, pixels, N]
    if per_position:
        parts = parts.unflatten(0, (conv.groups, -1)).sum(1)
    found = parts.transpose(0, 1).flatten(1) + conv.bias
    torch.testing.assert_close(found, conv(x).movedim(1, -1).flatten(0, -2))


def test_masked_training_and_its_masks(net, images, tmp_path):
    result = sparsify.prune(copy.deepcopy(net), block=BLOCK, sparsity=0.5)
    mask_model(net, result.masks)
    save_masks(tmp_path / "masks", current_masks(net))
    loaded = load_masks(tmp_path / "masks")
    for name, mask in result.masks.items():
        assert torch.equal(loaded[name].keep, mask.keep)
        assert (loaded[name].block, loaded[name].shape) == (mask.block, mask.shape)
    exact = copy.deepcopy(net)
    unmask(exact)
    torch.testing.assert_close(net(images), exact(images), rtol=0, atol=0)
    torch.testing.assert_close(net.state_dict()["blocks.1.0.weight"], exact.blocks[1][0].weight)
    net(images).sum().backward()
    exact(images).sum().backward()
    conv = net.blocks[1][0]
    torch.testing.assert_close(conv.weight.grad, exact.blocks[1][0].weight.grad)  # of pruned blocks too
    mask_gradients(net)
    kept = torch.cat([result.masks[f"blocks.1.0.group.{g}"].elements() for g in range(2)])
    assert torch.equal(conv.weight.grad.flatten(1) != 0, kept & (conv.weight.grad.flatten(1) != 0))
    assert not torch.equal(kept, torch.ones_like(kept))
    sparsify.apply(net, unmask(net))
    torch.testing.assert_close(net(images), exact(images))


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
def test_checkpoints(net, images, per_position, tmp_path):
    result = sparsify.prune(net, block=BLOCK, sparsity=0.6, per_position=per_position)
    sparsify.save(net, tmp_path / "sparse")
    loaded = sparsify.load(tmp_path / "sparse", model=Net())
    torch.testing.assert_close(loaded(images), net(images))
    info = reader.open_checkpoint(tmp_path / "sparse")
    found = {layer.name: layer for layer in info.layers}
    assert found["blocks.1.0"].shape == (64, 24, 3, 3) and found["blocks.1.0"].kind == "convolution"
    own = [mask for name, mask in result.masks.items() if name.startswith("blocks.1.0")]
    assert found["blocks.1.0"].density == pytest.approx(sum(mask.density for mask in own) / len(own))
    masks = reader.read_masks(tmp_path / "sparse")
    assert masks.keys() == result.masks.keys()
    assert all(torch.equal(masks[name].keep, mask.keep) for name, mask in result.masks.items())
    sparsify.densify(tmp_path / "sparse", tmp_path / "dense", model=Net())
    dense = sparsify.load(tmp_path / "dense", model=Net())
    torch.testing.assert_close(dense(images), net(images))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "shape",
            [40, 23, 3, 3],
            r"'blocks.0.0' does not fit the model: its shape is \[40, 23, 3, 3\] in 1 groups",
        ),
        ("shape", [40, 24], r"layer 'blocks.0.0': `shape` must be a list of 4 positive integers"),
        ("groups", 3, r"layer 'blocks.0.0': `groups` must be a positive integer that divides 40, got 3"),
        ("blocks", 91, r"layer 'blocks.0.0': `blocks` must be an integer from 0 to 90, got 91"),
        ("per_position", 1, r"layer 'blocks.0.0': `per_position` must be true or false, got 1"),
        ("block_shape", [8, 12], r"layer 'blocks.0.0': block shape 8x12 is not supported"),
        ("kind", "linear", r"layer 'blocks.0.0': `shape` must be a list of 2"),
    ],
)
def test_a_damaged_entry_is_refused(net, tmp_path, key, value, message):
    import json

    sparsify.prune(net, block=BLOCK, sparsity=0.5)
    sparsify.save(net, tmp_path / "sparse")
    file = tmp_path / "sparse" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["layers"]["blocks.0.0"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        sparsify.load(tmp_path / "sparse", model=Net())


def test_packed_training(net, images):
    sparsify.prune(net, block=BLOCK, sparsity=0.5)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    labels, losses = torch.tensor([1, 2, 3, 4]), []
    for _ in range(20):
        loss = functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_linear_layer_that_multiplies_as_much():
    block = BLOCK.over(9)
    keep = torch.tensor([[True, False], [False, True]])
    mask = as_linear(BlockMask(keep, (12, 20 * 9), block))
    assert mask.shape == (12, 32 * 9) and mask.block == BLOCK
    assert mask.blocks_kept == 9 * 2


def test_bench_measures_convolutions_beside_dense_ones(net):
    from sparsify.bench.layers import groups, measure_group
    from sparsify.bench.limits import Limits
    from sparsify.errors import SparsifyError

    sparsify.prune(net, block=BLOCK, sparsity=0.5)
    net.blocks[1][2].weight.data.mul_(2)
    found = {group.name: group for group in groups(net)}
    described = found["blocks.1.0"].describe()
    assert described["kind"] == "convolution" and described["shapes"] == [[64, 24, 3, 3]]
    assert described["bytes_dense"] == 4 * 64 * 24 * 9
    limits = Limits(1e12, 1e12)
    for group in found.values():
        (row,) = measure_group(group, Net(), [100], 1, lambda: None, limits)
        assert row["tokens"] == 100 and row["error"] < 1e-5 and row["speedup"] > 0
    broken = found["blocks.1.0"]
    broken.module.forward = lambda x: broken.module.to_conv()(x) * 1.01
    with pytest.raises(SparsifyError, match=r"blocks.1.0 at .* differs from its dense equivalent"):
        measure_group(broken, Net(), [100], 1, lambda: None, limits)


def test_adapters_are_refused(net):
    peft = pytest.importorskip("peft")
    from sparsify.errors import ConfigError
    from sparsify.training.lora import adaptable, register

    register()
    sparsify.prune(net, block=BLOCK, sparsity=0.5)
    before = repr(net)
    with pytest.raises(ConfigError, match=r"LoRA is not available for BlockSparseConv2d \(blocks.0.0\)"):
        peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["blocks.0.0"]))
    with pytest.raises(ConfigError, match="no block-sparse linear layer"):
        adaptable(net, None)
    assert repr(net) == before
