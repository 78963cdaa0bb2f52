"""`BlockSparseLinear` as a module: conversion both ways, state, dtype, training."""

import copy

import pytest
import torch
from torch import nn

from sparsify import BlockMask, BlockShape, BlockSparseLinear
from sparsify.errors import BlockShapeError


def _mask(shape=(70, 100), block=(16, 32), share=0.5):
    block = BlockShape(*block)
    return BlockMask(torch.rand(block.grid(shape)) < share, shape, block)


def _layer(**kwargs):
    linear = nn.Linear(100, 70, **kwargs)
    mask = _mask()
    return linear, mask, BlockSparseLinear.from_linear(linear, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_there_and_back_is_bit_identical(dtype, bias):
    linear, mask, sparse = _layer(dtype=dtype, bias=bias)
    back = sparse.to_linear()
    assert torch.equal(back.weight, linear.weight * mask.elements())
    assert (back.bias is None) == (not bias) and (not bias or torch.equal(back.bias, linear.bias))
    again = BlockSparseLinear.from_linear(back, sparse.mask)
    assert torch.equal(again.weight, sparse.weight) and torch.equal(again.col_indices, sparse.col_indices)
    assert sparse.density == mask.density and torch.equal(sparse.mask.keep, mask.keep)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all_empty", "all_full"])
def test_extreme_masks(share):
    mask = _mask(share=share)
    sparse = BlockSparseLinear(100, 70, (16, 32), mask=mask)
    x = torch.randn(4, 100, requires_grad=True)
    y = sparse(x)
    y.sum().backward()
    torch.testing.assert_close(y, sparse.to_linear()(x))
    assert sparse.weight.shape == (mask.blocks_kept, 32, 16)
    assert torch.equal(x.grad != 0, torch.full_like(x, share > 0, dtype=torch.bool))


def test_plain_tensor_mask_needs_a_block_shape():
    linear, mask, sparse = _layer()
    same = BlockSparseLinear.from_linear(linear, mask.keep, (16, 32))
    assert torch.equal(same.weight, sparse.weight)
    with pytest.raises(BlockShapeError, match="needs block_shape"):
        BlockSparseLinear.from_linear(linear, mask.keep)
    with pytest.raises(BlockShapeError, match=r"needs a \(5, 4\)"):
        BlockSparseLinear.from_linear(linear, mask.keep[:4], (16, 32))
    with pytest.raises(BlockShapeError, match="the layer is"):
        BlockSparseLinear(100, 64, (16, 32), mask=mask)


def test_state_dict_round_trip_and_deepcopy():
    _, mask, sparse = _layer()
    assert list(sparse.state_dict()) == ["weight", "bias", "crow_indices", "col_indices"]
    other = BlockSparseLinear(100, 70, (16, 32), blocks=mask.blocks_kept)
    other.load_state_dict(sparse.state_dict())
    clone = copy.deepcopy(sparse)
    x = torch.randn(3, 100)
    for layer in (other, clone):
        torch.testing.assert_close(layer(x), sparse(x), rtol=0, atol=0)
    clone.weight.data.zero_()
    assert sparse.weight.any()


def test_backward_after_loading_uses_the_loaded_mask():
    _, mask, sparse = _layer()
    other = BlockSparseLinear(100, 70, (16, 32), mask=mask.keep.flip(1)) if mask.keep.flip(1).sum() else None
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 100, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    other(x).sum().backward()
    sparse.to_linear()(x2).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)


def test_damaged_indices_stop_the_load():
    _, _, sparse = _layer()
    state = sparse.state_dict()
    state["col_indices"] = state["col_indices"] + 9
    with pytest.raises(
        RuntimeError, match=r"corrupted block indices of weight: block columns must lie in 0\.\.3"
    ):
        sparse.load_state_dict(state)


def test_to_dtype_leaves_the_indices_alone():
    _, _, sparse = _layer()
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert half.crow_indices.dtype == half.col_indices.dtype == torch.int32
    assert all(b.dtype == torch.int32 for b in half.buffers())
    y = half(torch.randn(3, 100, dtype=torch.bfloat16))
    torch.testing.assert_close(y.float(), y.float())
    assert sparse.to("meta").weight.is_meta


def test_nothing_dense_shaped_is_kept():
    _, mask, sparse = _layer()
    tensors = [*sparse.parameters(), *sparse.buffers()]
    assert max(t.numel() for t in tensors) == mask.blocks_kept * 16 * 32
    assert not any(t.numel() == 70 * 100 for t in tensors)


def test_training_moves_kept_values_and_never_the_padding():
    linear, mask, sparse = _layer()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.05, weight_decay=0.1)
    x, target = torch.randn(64, 100), torch.randn(64, 70)
    losses = []
    for _ in range(30):
        loss = (sparse(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    ones = BlockSparseLinear.from_linear(linear.requires_grad_(False), mask)
    ones.weight.copy_(sparse.weight)
    stored = sparse.weight.count_nonzero()
    assert stored == mask.elements_kept  # every own element moved, none of the padding did


def test_initialisation_matches_a_dense_layer_of_the_same_fan_in():
    full, dense = BlockSparseLinear(256, 128, 32), nn.Linear(256, 128)
    assert full.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.05)
    sparse = BlockSparseLinear(256, 128, 32, mask=_mask((128, 256), (32, 32), 0.25))
    assert sparse.weight.std() > 1.5 * full.weight.std()


def test_repr_tells_shape_block_and_density():
    _, mask, sparse = _layer()
    assert repr(sparse) == (
        f"BlockSparseLinear(in_features=100, out_features=70, bias=True, block_shape=16x32, "
        f"blocks={mask.blocks_kept}, density={mask.density:.3f})"
    )
    assert "density" not in repr(BlockSparseLinear(100, 70, (16, 32), blocks=3, device="meta"))


def test_compiles_whole():
    _, _, sparse = _layer()
    x = torch.randn(3, 100)
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


def test_gradient_checkpointing():
    _, _, sparse = _layer()
    x = torch.randn(3, 100, requires_grad=True)
    torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=False).sum().backward()
    kept = sparse.weight.grad.clone()
    sparse.weight.grad = None
    sparse(x).sum().backward()
    assert torch.equal(kept, sparse.weight.grad)


@pytest.mark.parametrize("width", [97, 99, 101, 128])
def test_refuses_inputs_of_another_width(width):
    _, _, sparse = _layer()
    with pytest.raises(ValueError, match=f"got {width} features, expected 100"):
        sparse(torch.randn(3, width))
