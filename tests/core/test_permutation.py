"""Free symmetries leave the function as it is, in every architecture; the order found keeps more in fewer blocks."""

import pytest
import torch

import sparsify
from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError
from sparsify.masking import mask_model
from sparsify.permutation import Permuted, best_order, permute
from sparsify.symmetries import Axis, Symmetry, symmetries
from tests.architectures.zoo import ARCHITECTURES

HEADS, HIDDEN, EXPERT, CHANNELS = "value head", "feed-forward", "expert", "output channels"
# What is known of each architecture; Phi-3 keeps gate and up, and query, key and value, in one weight each.
KNOWN = {
    "llama": {HEADS, HIDDEN}, "qwen3": {HEADS, HIDDEN}, "mistral": {HEADS, HIDDEN}, "gemma": {HEADS, HIDDEN},
    "phi3": set(), "gpt2": {HIDDEN}, "gpt-neox": {HIDDEN}, "opt": {HEADS}, "bert": {HEADS, HIDDEN},
    "roberta": {HEADS, HIDDEN}, "distilbert": {HEADS, HIDDEN}, "t5": {HEADS, HIDDEN}, "vit": {HEADS, HIDDEN},
    "whisper": {HEADS}, "clip": {HEADS, HIDDEN}, "mixtral": {HEADS, EXPERT}, "qwen3-moe": {HEADS, HIDDEN, EXPERT},
    # RegNet's convolutions have groups, whose channels cannot change places.
    "resnet": {CHANNELS}, "resnet-bottleneck": {CHANNELS}, "convnext": {CHANNELS}, "mobilenet-v2": {CHANNELS},
    "regnet": set(),
}  # fmt: skip


def kind(symmetry: Symmetry | Permuted) -> str:
    return next((name for name in (HEADS, EXPERT, CHANNELS) if f", {name}" in symmetry.name), HIDDEN)


def output(model, batch):
    with torch.no_grad():
        result = model(**batch)
    return result.logits_per_text if hasattr(result, "logits_per_text") else result.logits


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_permuted_model_computes_the_same(architecture):
    model = architecture.build()
    model.config._experts_implementation = "eager"  # the fused product of experts knows no float64
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # so that every part shows in the output
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for name, tensor in norm.state_dict().items():
                    if name != "num_batches_tracked":
                        tensor.uniform_(0.5, 2)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in architecture.batch().items()}
    before, found = output(model, batch), symmetries(model)
    assert {kind(symmetry) for symmetry in found} == KNOWN[architecture.name]
    for symmetry in found:
        symmetry.apply(torch.randperm(symmetry.units))
    assert (output(model, batch) - before).abs().max() < 1e-9 * before.abs().max()
    if found:  # one weight alone is no symmetry
        axis = found[-1].axes[-1]
        lonely = Symmetry("one weight", found[-1].units, (axis,))
        lonely.apply(torch.arange(lonely.units).roll(1))
        assert (output(model, batch) - before).abs().max() > 1e-3 * before.abs().max()


def test_grouped_queries_share_the_order_of_their_value_head():
    architecture = next(a for a in ARCHITECTURES if a.name == "llama")  # six query heads, two value heads
    heads = [s for s in symmetries(architecture.build()) if kind(s) == HEADS and "layers.0" in s.name]
    assert [len(head.axes) for head in heads] == [4, 4]  # the values' rows, three heads' columns
    columns = torch.cat([axis.positions for head in heads for axis in head.axes if axis.dim == 1])
    assert torch.equal(columns.sort().values, torch.arange(192))


def planted() -> Symmetry:
    """Strong units scattered among weak ones: every block of rows has some of both."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator) * 0.01
    weight[::2] += torch.randn(32, 32, generator=generator)
    out = torch.randn(16, 64, generator=generator)
    places = torch.arange(64)
    return Symmetry("planted", 64, (Axis("up", weight, 0, places), Axis("down", out, 1, places)))


def test_strong_units_come_together():
    symmetry = planted()
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    assert after > before + 0.05
    symmetry.apply(order)
    strong = symmetry.axes[0].tensor.square().sum(1) > 1
    in_blocks = strong.view(8, 8).sum(1).sort(descending=True).values
    assert in_blocks[:4].sum() >= 31  # of 32, which fill four blocks


def test_the_share_kept_is_that_of_the_blocks():
    symmetry = planted()
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    for share, own in ((before, torch.arange(64)), (after, order)):
        up = symmetry.axes[0].tensor[own].square().view(8, 8, 4, 8).sum((1, 3)).flatten()
        down = symmetry.axes[1].tensor[:, own].square().view(2, 8, 8, 8).sum((1, 3)).flatten()
        every = torch.cat([up, down])
        assert share == pytest.approx(float(every.topk(len(every) // 2).values.sum() / every.sum()), rel=1e-4)


def test_an_order_that_gains_nothing_is_not_taken():
    weight, places = torch.ones(16, 8), torch.arange(16)
    symmetry = Symmetry("even", 16, (Axis("up", weight, 0, places),))
    order, before, after = best_order(symmetry, BlockShape(8, 8), 0.5)
    assert torch.equal(order, places) and before == after


def test_no_permutation_is_refused():
    with pytest.raises(ValueError, match="expected a permutation of 64 units"):
        planted().apply(torch.zeros(64, dtype=torch.int64))


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "resnet-bottleneck"])
def test_permute_keeps_more_and_changes_nothing(name):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, batch = architecture.build(), architecture.batch()
    before = output(model, batch)
    gained = sparsify.permute(model, "8x8", 0.5)
    assert torch.allclose(output(model, batch), before, atol=1e-5 * float(before.abs().max()))
    assert all(own.after >= own.before for own in gained)
    assert max(own.after - own.before for own in gained) > 0.005


@pytest.mark.parametrize("per_position", [False, True])
def test_a_pruned_convolution_is_not_reordered(per_position):
    model = next(a for a in ARCHITECTURES if a.name == "resnet").build()
    result = sparsify.prune(model, block="8x8", convert=False, permute=True, per_position=per_position)
    assert result.permuted and {kind(own) for own in result.permuted} == {CHANNELS}
    mask_model(model, result.masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"cannot reorder the units of .*output channels: .* is pruned already"
    ):
        permute(model, "8x8", 0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_channels_of_a_convolution_come_in_blocks_of_all_positions():
    weight, out = torch.randn(16, 8, 9), torch.randn(8, 16, 9)
    places, squared = torch.arange(16), (weight.square().sum(2), out.square().sum(2))
    whole = Symmetry("conv", 16, (Axis("a", weight, 0, places), Axis("b", out, 1, places)))
    flat = Symmetry(
        "conv", 16, (Axis("a", squared[0].sqrt(), 0, places), Axis("b", squared[1].sqrt(), 1, places))
    )
    order, *shares = best_order(whole, BlockShape(8, 8), 0.5)
    expected, *others = best_order(flat, BlockShape(8, 8), 0.5)
    assert torch.equal(order, expected) and shares == pytest.approx(others)
    used = {"a": torch.rand(8 * 9)}  # mean squares of a convolution's inputs, by channel and position
    weighted = torch.einsum("oip,ip->oi", weight.square(), used["a"].view(8, 9)).sqrt()
    flat = Symmetry("conv", 16, (Axis("a", weighted, 0, places), Axis("b", squared[1].sqrt(), 1, places)))
    assert torch.equal(
        best_order(whole, BlockShape(8, 8), 0.5, used)[0], best_order(flat, BlockShape(8, 8), 0.5)[0]
    )


class BasicBlock(torch.nn.Module):
    """One of somebody's own, in an order of its own: its names prove nothing."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.bn1 = torch.nn.BatchNorm2d(16)


def test_a_block_of_an_unknown_class_is_left_alone():
    assert symmetries(torch.nn.Sequential(BasicBlock())) == []


class Bottleneck(torch.nn.Module):
    """timm's, as far as it matters."""

    def __init__(self, **options):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(24, 16, 1)
        self.bn1, self.act1 = torch.nn.BatchNorm2d(16), options.get("act1", torch.nn.ReLU())
        self.conv2 = torch.nn.Conv2d(16, 16, 3, groups=options.get("groups", 1))
        self.bn2, self.drop_block, self.act2 = torch.nn.BatchNorm2d(16), torch.nn.Identity(), torch.nn.ReLU()
        self.aa, self.conv3 = options.get("aa"), torch.nn.Conv2d(16, 24, 1)
        self.bn3 = torch.nn.BatchNorm2d(24)


Bottleneck.__module__ = "timm.models.resnet"


@pytest.mark.parametrize(
    ("options", "makers"),
    [
        ({}, {"conv1", "conv2"}),
        ({"groups": 4}, set()),  # the first has a reader with groups, the second is one
        ({"act1": torch.nn.PReLU(16)}, {"conv2"}),
        ({"aa": torch.nn.GroupNorm(4, 16)}, {"conv1"}),
        ({"aa": torch.nn.AvgPool2d(2)}, {"conv1", "conv2"}),
        ({"groups": 16}, {"conv1"}),  # depthwise: goes along
    ],
    ids=["plain", "groups", "PReLU", "group norm", "pooling", "depthwise"],
)
def test_what_lies_between_two_convolutions(options, makers):
    found = symmetries(torch.nn.ModuleDict({"block": Bottleneck(**options)}))
    assert {symmetry.name for symmetry in found} == {f"block.{maker}, output channels" for maker in makers}
    names = {axis.name for symmetry in found for axis in symmetry.axes}
    assert "block.bn3.weight" not in names
    if makers == {"conv1", "conv2"}:
        assert {"block.bn1.mean", "block.bn2.variance", "block.conv2.bias", "block.conv3"} <= names


def test_sparse_layers_have_no_free_symmetry():
    architecture = next(a for a in ARCHITECTURES if a.name == "llama")
    model = architecture.build()
    sparsify.prune(model, block="32x32", sparsity=0.5)
    assert not symmetries(model) and permute(model, "32x32", 0.5) == []
