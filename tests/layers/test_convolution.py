"""`BlockSparseConv2d` and `BlockSparseConv1d` as modules: conversion both ways, state, memory formats, training."""

import copy

import pytest
import torch
from torch import nn

from sparsify import BlockMask, BlockShape, BlockSparseConv1d, BlockSparseConv2d
from sparsify.conv_weight import ConvWeight
from sparsify.errors import BlockShapeError, ConfigError

CASES = {
    "plain": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "stride": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "oblong": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)}),
    "same_even": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}),
    "pointwise": (nn.Conv2d, {"kernel_size": 1}),
    "pointwise_stride": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "bias": False}),
    "pointwise_padded": (nn.Conv2d, {"kernel_size": 1, "padding": 1}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "grouped_pointwise": (nn.Conv2d, {"kernel_size": 1, "groups": 2}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}),
    "reflect_same": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}),
    "one": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "one_stride": (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 2}),
    "one_replicate": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}),
    "one_pointwise": (nn.Conv1d, {"kernel_size": 1}),
}
SPARSE = {nn.Conv1d: BlockSparseConv1d, nn.Conv2d: BlockSparseConv2d}
BLOCK = BlockShape(16, 8)


def _layout(conv, per_position=False):
    return ConvWeight(conv.out_channels, conv.in_channels, conv.kernel_size, conv.groups, per_position)


def _masks(layout, share=0.5):
    block = layout.block(BLOCK)
    return [
        BlockMask(torch.rand(block.grid(layout.shape)) < share, layout.shape, block)
        for _ in range(layout.count)
    ]


def _pair(name, per_position=False, share=0.5, **options):
    kind, settings = CASES[name]
    dense = kind(20, 36, **settings, **options)  # neither count is a multiple of its side of the block
    layout = _layout(dense, per_position)
    masks = _masks(layout, share)
    with torch.no_grad():
        dense.weight *= layout.join(torch.stack([mask.elements() for mask in masks]))
    sparse = SPARSE[kind].from_conv(dense, masks, per_position=per_position)
    x = torch.randn(3, 20, *(7, 10)[-len(dense.kernel_size) :], dtype=dense.weight.dtype)
    return dense, sparse, x


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_dense_layer(name, per_position):
    dense, sparse, x = _pair(name, per_position, dtype=torch.float64)
    x.requires_grad_()
    again = x.detach().clone().requires_grad_()
    expected, actual = dense(x), sparse(again)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    actual.backward(gradient)
    torch.testing.assert_close(again.grad, x.grad)
    keep = sparse.layout.stored(sparse.masks)
    torch.testing.assert_close(sparse.weight.grad, sparse.layout.pack(dense.weight.grad, keep, BLOCK))
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("per_position", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "groups", "one"])
def test_there_and_back_is_bit_identical(name, dtype, per_position):
    dense, sparse, _ = _pair(name, per_position, dtype=dtype)
    back = sparse.to_conv()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert repr(back) == repr(dense)
    again = type(sparse).from_conv(back, sparse.masks, per_position=per_position)
    assert torch.equal(again.weight, sparse.weight)
    assert torch.equal(again.col_indices, sparse.col_indices)
    assert sparse.density == pytest.approx((dense.weight != 0).float().mean().item())


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all_empty", "all_full"])
def test_extreme_masks(share):
    dense, sparse, x = _pair("stride", share=share)
    torch.testing.assert_close(sparse(x), dense(x))
    assert len(sparse.weight) == share * 9 * 3 * 3


def test_memory_formats():
    dense, sparse, x = _pair("plain")
    last = x.to(memory_format=torch.channels_last)
    assert sparse(x).is_contiguous()
    assert sparse(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(last), dense(x))
    torch.testing.assert_close(sparse(x[0]), dense(x[0]))
    line, sparse_line, y = _pair("one")
    torch.testing.assert_close(sparse_line(y.transpose(1, 2).contiguous().transpose(1, 2)), line(y))
    torch.testing.assert_close(sparse_line(y[0]), line(y[0]))


def test_a_channels_last_weight_is_packed_like_any():
    dense, sparse, _ = _pair("plain")
    masks = sparse.masks
    again = BlockSparseConv2d.from_conv(copy.deepcopy(dense).to(memory_format=torch.channels_last), masks)
    assert torch.equal(again.weight, sparse.weight)


def test_state_dict_round_trip_and_deepcopy():
    _, sparse, x = _pair("stride")
    assert list(sparse.state_dict()) == ["weight", "bias", "crow_indices", "col_indices"]
    other = BlockSparseConv2d(20, 36, 3, BLOCK, stride=2, padding=1, blocks=len(sparse.weight))
    other.load_state_dict(sparse.state_dict())
    clone = copy.deepcopy(sparse)
    for layer in (other, clone):
        y = x.clone().requires_grad_()
        z = x.clone().requires_grad_()
        torch.testing.assert_close(layer(y), sparse(z), rtol=0, atol=0)
        layer(y).sum().backward()
        sparse(z).sum().backward()
        torch.testing.assert_close(y.grad, z.grad, rtol=0, atol=0)
    clone.weight.data.zero_()
    assert sparse.weight.any()


def test_damaged_indices_stop_the_load():
    _, sparse, _ = _pair("plain")
    state = sparse.state_dict()
    state["col_indices"] = state["col_indices"] + 27
    with pytest.raises(
        RuntimeError, match=r"corrupted block indices of weight: block columns must lie in 0\.\.26"
    ):
        sparse.load_state_dict(state)


def test_nothing_dense_shaped_is_kept():
    dense, sparse, _ = _pair("plain")
    assert not any(t.numel() == dense.weight.numel() for t in [*sparse.parameters(), *sparse.buffers()])
    half = sparse.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.col_indices.dtype == torch.int32


def test_training_moves_kept_values_and_never_the_padding():
    _, sparse, x = _pair("plain")
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.02, weight_decay=0.1)
    target = torch.randn(3, 36, 7, 10)
    losses = []
    for _ in range(30):
        loss = (sparse(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    kept = sum(mask.elements_kept for mask in sparse.masks)
    assert sparse.weight.count_nonzero() == kept < sparse.weight.numel()


def test_initialisation_matches_a_dense_layer_of_the_same_fan_in():
    full, dense = BlockSparseConv2d(64, 64, 3, 16), nn.Conv2d(64, 64, 3)
    assert full.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.05)
    sparse = BlockSparseConv2d(64, 64, 3, 16, mask=torch.rand(4, 4) < 0.4)
    assert sparse.weight.std() > 1.2 * full.weight.std()


def test_compiles_and_exports_whole():
    dense, sparse, x = _pair("stride")
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dense(x))
    exported = torch.export.export(sparse, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    wide = torch.randn(5, 20, 7, 10)
    torch.testing.assert_close(exported.module()(wide), dense(wide))


@pytest.mark.parametrize("name", ["plain", "pointwise"])
def test_autocast(name):
    dense, sparse, x = _pair(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense(x), atol=0.05, rtol=0.05)


def test_wrong_inputs_are_named():
    _, sparse, x = _pair("plain")
    with pytest.raises(ValueError, match=r"got \(3, 19, 7, 10\), expected 20 channels"):
        sparse(x[:, 1:])
    with pytest.raises(ValueError, match=r"got \(20,\), expected 20 channels"):
        sparse(x[0, :, 0, 0])
    valid = BlockSparseConv2d(20, 36, 5, BLOCK)
    with pytest.raises(ValueError, match=r"smaller than the kernel"):
        valid(x[..., :4])


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"groups 3 do not divide 20 input"):
        BlockSparseConv2d(20, 36, 3, BLOCK, groups=3)
    with pytest.raises(ConfigError, match=r"'same' has no meaning for a stride"):
        BlockSparseConv2d(20, 36, 3, BLOCK, stride=2, padding="same")
    with pytest.raises(ConfigError, match=r"padding 'some' is unknown"):
        BlockSparseConv2d(20, 36, 3, BLOCK, padding="some")
    with pytest.raises(ConfigError, match=r"got \(3, 3\), expected one number for each of 1 dimensions"):
        BlockSparseConv1d(20, 36, (3, 3), BLOCK)
    with pytest.raises(BlockShapeError, match=r"needs a \(3, 3\)"):
        BlockSparseConv2d(20, 36, 3, BLOCK, mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(BlockShapeError, match=r"blocks of 16x8 over 1 kernel positions, the layer .* over 9"):
        BlockSparseConv2d(20, 36, 3, BLOCK, mask=BlockMask.full((36, 20), BLOCK))
    with pytest.raises(BlockShapeError, match=r"got 1 for .* expected 2"):
        BlockSparseConv2d(20, 36, 3, BLOCK, mask=BlockMask.full((18, 90), BLOCK.over(9)), groups=2)
    with pytest.raises(BlockShapeError, match="needs block_shape"):
        BlockSparseConv2d.from_conv(nn.Conv2d(20, 36, 3), torch.ones(3, 3, dtype=torch.bool))


def test_repr_tells_sizes_block_and_density():
    sparse = BlockSparseConv2d(16, 32, 3, BLOCK, padding=1, groups=2, per_position=True)
    assert repr(sparse) == (
        "BlockSparseConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=True, "
        "block_shape=16x8, per_position=True, blocks=18, density=1.000)"
    )
    assert "density" not in repr(BlockSparseConv1d(16, 32, 3, BLOCK, blocks=3, device="meta"))
