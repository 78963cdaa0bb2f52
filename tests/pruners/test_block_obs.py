"""Block OBS against brute force: least squares on the calibration inputs themselves, with the support fixed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape, block_sizes
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, create_pruner

TINY = 1e-9  # damping too small to be seen
SHAPES = [
    pytest.param((16, 32), (8, 8), id="even"),
    pytest.param((21, 29), (8, 8), id="edges"),
    pytest.param((20, 40), (16, 8), id="tall"),
    pytest.param((12, 40), (16, 16), id="one-row"),
]


def inputs_of(features: int, tokens: int = 300) -> Tensor:
    """Correlated inputs of different sizes."""
    mixing = torch.eye(features) + 0.4 * torch.randn(features, features)
    return torch.randn(tokens, features) @ mixing * torch.linspace(0.5, 2.0, features)


def make_layer(shape, block, tokens: int = 300, dtype=torch.float32) -> tuple[PrunableLayer, Tensor]:
    inputs = inputs_of(shape[1], tokens)
    layer = PrunableLayer("layer", "layer", nn.Parameter(torch.randn(shape).to(dtype)), BlockShape(*block))
    for part in inputs.split(100):
        create_pruner("block_obs").calibrate(layer, part)
    return layer, inputs


def least_squares(inputs: Tensor, outputs: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The best weights `(n, K)` for `outputs` `(tokens, n)`, zero where `keep` `(K,)` is not, and their error."""
    columns = inputs[:, keep].double()
    solution = torch.linalg.lstsq(columns, outputs.double()).solution
    weight = torch.zeros(outputs.shape[1], len(keep), dtype=torch.float64)
    weight[:, keep] = solution.t()
    return weight, (columns @ solution - outputs).square().sum() / len(inputs)


def error(layer: PrunableLayer, inputs: Tensor, dense: Tensor) -> float:
    return float(((layer.weight - dense) @ inputs.t()).square().sum() / len(inputs))


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_the_first_block_of_a_row_to_go_has_the_error_of_exact_least_squares(shape, block):
    layer, inputs = make_layer(shape, block)
    score = create_pruner("block_obs", damping=TINY).score(layer)
    energy = (layer.weight @ inputs.t()).square().sum() / len(inputs)
    errors = score * energy * block_sizes(layer.shape, layer.block)
    rows, cols = layer.grid
    for row in range(rows):
        weight = layer.weight[row * block[0] : (row + 1) * block[0]]
        removals = []
        for col in range(cols):
            keep = torch.ones(shape[1], dtype=torch.bool)
            keep[col * block[1] : (col + 1) * block[1]] = False
            removals.append(least_squares(inputs, inputs @ weight.t(), keep)[1])
        best = int(torch.stack(removals).argmin())
        assert int(errors[row].argmin()) == best
        torch.testing.assert_close(errors[row, best].double(), removals[best].double(), rtol=1e-3, atol=1e-6)


def test_the_errors_of_a_row_add_up_to_what_is_lost_in_the_end():
    """Emptied one by one, a row's marginal errors, before they are made non-decreasing, sum up to its energy."""
    layer, inputs = make_layer((8, 64), (8, 8))
    errors = create_pruner("block_obs", damping=TINY).score(layer) * 64
    assert float(errors.sum()) >= 1 - 1e-3
    order = errors[0].argsort()
    removed: list[int] = []
    energy, before = (layer.weight @ inputs.t()).square().sum() / len(inputs), 0.0
    for col in order[:-1].tolist():  # greedy removal, each step solved from scratch
        removed.append(col)
        keep = torch.ones(64, dtype=torch.bool)
        for gone in removed:
            keep[gone * 8 : gone * 8 + 8] = False
        after = float(least_squares(inputs, inputs @ layer.weight.t(), keep)[1] / energy)
        assert after - before <= float(errors[0, col]) * 1.01 + 1e-6
        before = after


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_kept_weights_are_the_best_there_are(shape, block, transposed):
    layer, inputs = make_layer(shape, block)
    if transposed:
        statistics = layer.statistics
        layer = PrunableLayer("x", "x", nn.Parameter(layer.weight.t().clone()), layer.block, transposed=True)
        layer.statistics = statistics
    dense = layer.weight.clone()
    keep = torch.rand(layer.grid) < 0.5
    keep[0] = False  # a block row without any block
    keep[-1, -1] = True
    mask = BlockMask(keep, shape, layer.block)
    create_pruner("block_obs", damping=TINY).update_weights(layer, mask)
    elements = mask.elements()
    assert not layer.weight[~elements].any()
    for row in range(shape[0]):
        expected = least_squares(inputs, inputs @ dense[row : row + 1].t(), elements[row])[0]
        torch.testing.assert_close(layer.weight[row].double(), expected[0], rtol=1e-3, atol=1e-3)


def test_outputs_of_the_dense_model_are_aimed_at_where_its_inputs_are_known():
    layer, inputs = make_layer((16, 32), (8, 8))
    before = inputs + 0.5 * inputs_of(32)  # what came in before the layers in front were pruned
    layer.statistics["cross"] = before.t() @ inputs / len(inputs)
    dense, mask = layer.weight.clone(), BlockMask(torch.eye(2, 4) == 0, (16, 32), BlockShape(8, 8))
    create_pruner("block_obs", damping=TINY).update_weights(layer, mask)
    for row in range(16):
        expected = least_squares(inputs, before @ dense[row : row + 1].t(), mask.elements()[row])[0]
        torch.testing.assert_close(layer.weight[row].double(), expected[0], rtol=1e-3, atol=1e-3)


def test_each_step_of_the_method_lowers_the_error():
    """Update beats no update, and errors estimated anew beat errors estimated once."""
    layer, inputs = make_layer((32, 128), (8, 8), 1000)
    dense, found = layer.weight.clone(), {}
    for name, options in {"anew": {}, "once": {"steps": 1}, "frozen": {"update": False}}.items():
        pruner = create_pruner("block_obs", **options)
        layer.weight.copy_(dense)
        score = pruner.score(layer)
        order = score.flatten().argsort()
        keep = torch.ones(score.numel(), dtype=torch.bool)
        keep[order[: score.numel() // 2]] = False
        mask = BlockMask(keep.view(layer.grid), layer.shape, layer.block)
        if pruner.compensates:
            pruner.update_weights(layer, mask)
        layer.weight.mul_(mask.elements())
        found[name] = error(layer, inputs, dense)
    assert found["anew"] < 0.97 * found["once"] < found["once"] < 0.5 * found["frozen"]


def test_a_mask_that_keeps_everything_changes_nothing():
    layer, _ = make_layer((16, 32), (8, 8))
    dense = layer.weight.clone()
    create_pruner("block_obs").update_weights(layer, BlockMask.full((16, 32), layer.block))
    assert torch.equal(layer.weight, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_stay_what_they_are(dtype):
    layer, inputs = make_layer((16, 32), (8, 8), dtype=dtype)
    dense, mask = layer.weight.float(), BlockMask(torch.eye(2, 4) == 0, (16, 32), BlockShape(8, 8))
    create_pruner("block_obs").update_weights(layer, mask)
    assert layer.weight.dtype == dtype
    zeroed = ((dense * ~mask.elements()) @ inputs.t()).square().sum() / len(inputs)
    assert float(((layer.weight.float() - dense) @ inputs.t()).square().sum() / len(inputs)) < 0.9 * float(
        zeroed
    )


def test_a_singular_hessian_is_dampened_and_said(caplog):
    layer, _ = make_layer((16, 32), (8, 8), tokens=5)
    pruner = create_pruner("block_obs", damping=1e-18)
    with caplog.at_level(logging.WARNING, "sparsify"):
        score = pruner.score(layer)
    assert torch.isfinite(score).all()
    assert "the Hessian of layer layer is singular: dampened by" in caplog.text


def test_a_layer_that_no_token_reached_is_judged_by_its_weights():
    layer, _ = make_layer((16, 32), (8, 8))
    layer.statistics["hessian"].zero_()
    score = create_pruner("block_obs").score(layer)
    expected = layer.weight.square().view(2, 8, 4, 8).sum((1, 3))
    torch.testing.assert_close(score, expected / layer.weight.square().sum() / 64)
    dense, mask = layer.weight.clone(), BlockMask(torch.eye(2, 4) == 0, (16, 32), BlockShape(8, 8))
    create_pruner("block_obs").update_weights(layer, mask)
    torch.testing.assert_close(layer.weight, dense * mask.elements())


def test_bad_values_are_named():
    with pytest.raises(PrunerError, match="damping 0 is out of range"):
        create_pruner("block_obs", damping=0)
    with pytest.raises(PrunerError, match="steps 0 is out of range"):
        create_pruner("block_obs", steps=0)
    layer, _ = make_layer((16, 32), (8, 8))
    layer.statistics["hessian"][3, 3] = torch.nan
    with pytest.raises(PrunerError, match="calibration inputs of layer layer hold NaN or infinity"):
        create_pruner("block_obs").score(layer)
    layer, _ = make_layer((16, 32), (8, 8))
    layer.weight[3, 3] = torch.inf
    with pytest.raises(PrunerError, match="weights of layer layer hold NaN"):
        create_pruner("block_obs").score(layer)
