"""Magnitude scores: the right norm, whatever the block and wherever the weight ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsify.blocks import BlockShape, to_blocks
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, create_pruner

NORMS = {
    "l1": lambda w: w.abs().mean(),
    "l2": lambda w: w.square().mean().sqrt(),
    "max": lambda w: w.abs().max(),
}


def make_layer(weight: torch.Tensor, block: BlockShape) -> PrunableLayer:
    return PrunableLayer("layer", "layer", nn.Parameter(weight), block)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    sides=st.tuples(st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 32])),
    norm=st.sampled_from(sorted(NORMS)),
)
def test_a_block_is_judged_by_its_own_elements(shape, sides, norm):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    layer = make_layer(weight, BlockShape(*sides))
    score = create_pruner("magnitude", norm=norm).score(layer)
    assert score.shape == layer.grid and score.dtype == torch.float32
    for row in range(score.shape[0]):
        for col in range(score.shape[1]):
            own = weight[row * sides[0] :, col * sides[1] :][: sides[0], : sides[1]]
            torch.testing.assert_close(score[row, col], NORMS[norm](own))


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_weights_score_the_same_in_any_block_and_dtype(norm, dtype):
    pruner = create_pruner("magnitude", norm=norm)
    for block in (BlockShape(8, 8), BlockShape(64, 16), BlockShape(256, 256)):
        score = pruner.score(make_layer(torch.full((100, 36), 0.5, dtype=dtype), block))
        torch.testing.assert_close(score, torch.full_like(score, 0.5))


def test_relative_scores_do_not_depend_on_the_layers_scale():
    weight, block = torch.randn(64, 48), BlockShape(16, 16)
    pruner = create_pruner("magnitude", relative=True)
    score = pruner.score(make_layer(weight, block))
    torch.testing.assert_close(pruner.score(make_layer(100 * weight, block)), score)
    torch.testing.assert_close(score.square().mean(), torch.tensor(1.0))
    assert torch.equal(pruner.score(make_layer(0 * weight, block)), torch.zeros(4, 3))


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_damaged_weights_name_the_layer(norm, value):
    weight = torch.randn(20, 20)
    weight[19, 19] = value
    with pytest.raises(PrunerError, match="weights of layer layer hold NaN or infinity"):
        create_pruner("magnitude", norm=norm).score(make_layer(weight, BlockShape(8, 8)))


def test_scores_are_of_a_transposed_weights_own_blocks():
    weight, block = torch.randn(40, 24), BlockShape(16, 8)
    stored = PrunableLayer("x", "x", nn.Parameter(weight.t().contiguous()), block, transposed=True)
    expected = to_blocks(weight, block).square().sum((2, 3))
    score = create_pruner("magnitude").score(stored)
    assert score.shape == (3, 3)
    torch.testing.assert_close(score[:2], (expected[:2] / 128).sqrt())
    torch.testing.assert_close(score[2], (expected[2] / 64).sqrt())
