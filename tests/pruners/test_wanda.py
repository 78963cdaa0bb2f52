"""Wanda's score: weights times their inputs, block by block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.blocks import BlockShape
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, create_pruner


def make_layer(shape: tuple[int, int], block: BlockShape, inputs: torch.Tensor) -> PrunableLayer:
    layer = PrunableLayer("layer", "layer", nn.Parameter(torch.randn(shape)), block)
    create_pruner("wanda").calibrate(layer, inputs)
    return layer


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_block_is_judged_by_its_own_weights_and_their_inputs(norm):
    inputs = torch.randn(200, 21) * torch.arange(21)
    layer = make_layer((19, 21), BlockShape(8, 16), inputs)
    score = create_pruner("wanda", norm=norm, relative=False).score(layer)
    seen = layer.weight.abs() * inputs.square().mean(0).sqrt()
    for row in range(3):
        for col in range(2):
            own = seen[8 * row : 8 * row + 8, 16 * col : 16 * col + 16]
            expected = own.mean() if norm == "l1" else own.square().mean().sqrt()
            torch.testing.assert_close(score[row, col], expected)


def test_the_squared_score_is_the_error_of_removing_a_block_of_uncorrelated_inputs():
    inputs = torch.randn(100_000, 32) * torch.linspace(0.5, 2.0, 32)
    layer = make_layer((16, 32), BlockShape(8, 8), inputs)
    score = create_pruner("wanda", norm="l2", relative=False).score(layer)
    for row in range(2):
        for col in range(4):
            lost = (
                layer.weight[8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
                @ inputs[:, 8 * col : 8 * col + 8].t()
            )
            expected = lost.square().sum(0).mean() / 64
            torch.testing.assert_close(score[row, col].square(), expected, rtol=0.05, atol=0.0)


def test_relative_scores_do_not_depend_on_the_scale_of_weights_or_inputs():
    inputs = torch.randn(50, 32)
    layer = make_layer((16, 32), BlockShape(8, 8), inputs)
    score = create_pruner("wanda").score(layer)
    other = PrunableLayer("other", "other", nn.Parameter(100 * layer.weight), layer.block)
    create_pruner("wanda").calibrate(other, 0.01 * inputs)
    torch.testing.assert_close(create_pruner("wanda").score(other), score)


def test_inputs_that_never_came_score_zero():
    layer = make_layer((16, 32), BlockShape(8, 8), torch.zeros(5, 32))
    assert not create_pruner("wanda").score(layer).any()


def test_bad_values_are_named():
    with pytest.raises(PrunerError, match="norm 'l3' is unknown: choose one of l1, l2"):
        create_pruner("wanda", norm="l3")
    layer = make_layer((16, 32), BlockShape(8, 8), torch.ones(5, 32))
    layer.weight[0, 0] = torch.nan
    with pytest.raises(PrunerError, match="weights of layer layer hold NaN"):
        create_pruner("wanda").score(layer)
