"""Parts of layers compute what the whole layer does, and make it up again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.layers.linear import BlockSparseLinear
from sparsify.parallel.split import Side, Split, costs, features_of, part_of, step_of, whole_tensors

SIZES = (72, 100)  # out, in: the last blocks of 16x16 are parts of one


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Linear(SIZES[1], SIZES[0], dtype=torch.float64)
    if kind == "dense":
        return dense
    block = BlockShape.parse("16x8" if kind == "16x8" else 16)
    keep = torch.rand(block.grid(SIZES)) > (1.0 if kind == "empty" else 0.6)
    keep[1] = False
    return BlockSparseLinear.from_linear(dense, BlockMask(keep, SIZES, block))


def split_of(module: nn.Module, side: Side) -> Split:
    """Three ranks with any steps, the last one's last step a part of a block."""
    size, step = features_of(module, side), step_of(module, side)
    order = torch.randperm(-(-size // step))
    parts = (order[:1], order[1:3], order[3:]) if step > 1 else order.split(30)
    return Split(side, size, step, tuple(part.sort().values for part in parts))


@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["dense", "16x16", "16x8", "empty"])
def test_parts_compute_what_the_whole_does(kind: str, side: Side):
    whole = layer(kind)
    split = split_of(whole, side)
    x = torch.randn(5, SIZES[1], dtype=torch.float64)
    parts = [part_of(whole, split, rank) for rank in range(len(split.steps))]
    if side == "outputs":
        expected = whole(x)
        for rank, part in enumerate(parts):
            torch.testing.assert_close(part(x), expected[:, split.features(rank)])
    else:
        pieces = [part(x[:, split.features(rank)]) for rank, part in enumerate(parts)]
        torch.testing.assert_close(torch.stack(pieces).sum(0), whole(x))
    assert sum(part.weight.numel() for part in parts) == whole.weight.numel()  # pyright: ignore


@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["dense", "16x16", "16x8", "empty"])
def test_parts_make_up_the_whole_again(kind: str, side: Side):
    whole = layer(kind)
    split = split_of(whole, side)
    states = [part_of(whole, split, rank).state_dict() for rank in range(len(split.steps))]
    grid = whole.packed["weight"].grid if isinstance(whole, BlockSparseLinear) else None
    again, expected = whole_tensors(states, split, grid), whole.state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name


def test_parts_keep_what_a_layer_is():
    whole = layer("16x16").eval()
    assert isinstance(whole, BlockSparseLinear)
    whole.weight.requires_grad_(False)
    whole.transposed = True
    part = part_of(whole, split_of(whole, "outputs"), 1)
    assert isinstance(part, BlockSparseLinear) and part.transposed
    assert (
        not part.training
        and not part.weight.requires_grad
        and part.bias is not None
        and part.bias.requires_grad
    )


def test_the_first_rank_alone_adds_the_bias():
    whole = layer("dense")
    split = split_of(whole, "inputs")
    assert [part_of(whole, split, rank).bias is None for rank in range(3)] == [False, True, True]


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_costs_count_stored_elements(side: Side):
    whole = layer("16x16")
    assert isinstance(whole, BlockSparseLinear)
    assert costs(whole, side, 32).sum() == whole.weight.numel()
    assert costs(whole, side, 16)[1 if side == "outputs" else slice(0)].sum() == 0
    assert costs(layer("dense"), side, 16).sum() == SIZES[0] * SIZES[1]
