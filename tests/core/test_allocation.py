"""Scores to masks: exact, within bounds, deterministic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsify.allocation.budget import FLOOR_SHARE, SCOPES, Budget, allocate
from sparsify.blocks import BlockShape, block_sizes
from sparsify.errors import ConfigError, PrunerError
from sparsify.pruner import PrunableLayer

SIDES = st.sampled_from([8, 16, 32])
SPARSITIES = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 0.999]),
    st.floats(0.0, 1.0, exclude_max=True, allow_nan=False),
)

OWN_DENSITY = ("erdos_renyi", "outlier", "sensitivity")


def make_layers(shapes: list[tuple[int, int]], block: BlockShape) -> list[PrunableLayer]:
    return [
        PrunableLayer(f"layer{i}", f"layer{i}", nn.Parameter(torch.empty(shape)), block)
        for i, shape in enumerate(shapes)
    ]


def make_scores(layers: list[PrunableLayer], seed: int, levels: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {layer.name: torch.rand(layer.grid, generator=generator) for layer in layers}
    return {name: (s * levels).floor() for name, s in scores.items()} if levels else scores


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[PrunableLayer], dict[str, torch.Tensor]]:
    block = BlockShape(draw(SIDES), draw(SIDES))
    shapes = draw(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=5))
    layers = make_layers(shapes, block)
    generator = torch.Generator().manual_seed(len(shapes))
    for layer in layers:
        layer.weight.copy_(torch.randn(layer.shape, generator=generator))
        layer.statistics["input_sq"] = torch.rand(layer.shape[1], generator=generator) ** 8
    return layers, make_scores(layers, draw(st.integers(0, 99)), draw(st.sampled_from([None, 1, 3])))


def curves(layers: list[PrunableLayer]) -> dict[str, dict[float, float]]:
    """Made-up sensitivities: a rising one, one with noise in it, one that says nothing."""
    kinds = [{0.25: 0.1, 0.5: 0.5, 0.9: 3.0}, {0.5: -0.1, 0.75: 0.2, 0.9: 0.1}, {0.5: 0.0}]
    return {layer.name: kinds[index % 3] for index, layer in enumerate(layers)}


def elements(layers: list[PrunableLayer]) -> int:
    return sum(layer.shape[0] * layer.shape[1] for layer in layers)


def removed(layer: PrunableLayer, keep: torch.Tensor) -> int:
    return int(block_sizes(layer.shape, layer.block)[~keep].sum())


@given(problem=problems(), sparsity=SPARSITIES, scope=st.sampled_from(SCOPES))
def test_total_is_exact_within_half_a_block(problem, sparsity, scope):
    layers, scores = problem
    masks = allocate(scores, layers, sparsity, scope, curves=curves(layers))
    total = sum(removed(layer, masks[layer.name].keep) for layer in layers)
    assert abs(total - sparsity * elements(layers)) <= layers[0].block.numel / 2


@given(problem=problems(), sparsity=SPARSITIES, scope=st.sampled_from(["layer", "row"]))
def test_each_layer_is_exact_within_one_block(problem, sparsity, scope):
    layers, scores = problem
    masks = allocate(scores, layers, sparsity, scope)
    for layer in layers:
        share = sparsity * layer.shape[0] * layer.shape[1]
        assert abs(removed(layer, masks[layer.name].keep) - share) <= layer.block.numel


@given(problem=problems(), sparsity=SPARSITIES)
def test_row_scope_balances_block_rows(problem, sparsity):
    layers, scores = problem
    for mask in allocate(scores, layers, sparsity, "row").values():
        kept = mask.keep.sum(1)
        assert int(kept.max() - kept.min()) <= 1


@given(problem=problems(), sparsity=SPARSITIES)
def test_layer_and_global_scope_never_keep_less_than_they_remove(problem, sparsity):
    layers, scores = problem
    for mask, name in ((m, n) for n, m in allocate(scores, layers, sparsity, "layer").items()):
        if mask.keep.any() and not mask.keep.all():
            assert scores[name][mask.keep].min() >= scores[name][~mask.keep].max()
    masks = allocate(scores, layers, sparsity, "global", floor=0.0)
    kept = torch.cat([scores[n][m.keep] for n, m in masks.items()])
    gone = torch.cat([scores[n][~m.keep] for n, m in masks.items()])
    if len(kept) and len(gone):
        assert kept.min() >= gone.max()


@given(problem=problems(), sparsity=SPARSITIES, low=st.floats(0, 1), high=st.floats(0, 1))
def test_floor_and_ceiling_hold_within_one_block_and_the_total_stays_exact(problem, sparsity, low, high):
    layers, scores = problem
    floor, ceiling = low * (1 - sparsity), 1 - high * sparsity
    masks = allocate(scores, layers, sparsity, "global", floor, ceiling)
    for layer in layers:
        size = layer.shape[0] * layer.shape[1]
        kept, block = size - removed(layer, masks[layer.name].keep), layer.block.numel
        assert floor * size - block < kept < ceiling * size + block
    total = sum(removed(layer, masks[layer.name].keep) for layer in layers)
    assert abs(total - sparsity * elements(layers)) <= layers[0].block.numel / 2


def test_floor_and_ceiling_are_exact_where_blocks_allow():
    layers = make_layers([(64, 64)] * 3, BlockShape(8, 8))
    scores = {"layer0": torch.zeros(8, 8), "layer1": torch.ones(8, 8), "layer2": torch.full((8, 8), 2.0)}
    masks = allocate(scores, layers, 0.5, "global", floor=0.25, ceiling=0.75)
    assert [m.density for m in masks.values()] == [0.25, 0.5, 0.75]
    assert [m.density for m in allocate(scores, layers, 0.5, "global", 0.0).values()] == [0.0, 0.5, 1.0]


@given(problem=problems(), sparsity=SPARSITIES, scope=st.sampled_from(SCOPES))
def test_the_same_input_gives_the_same_masks(problem, sparsity, scope):
    layers, scores = problem
    again = {name: score.clone().double() for name, score in scores.items()}
    first, second = (
        allocate(values, layers, sparsity, scope, curves=curves(layers)) for values in (scores, again)
    )
    assert all(torch.equal(first[name].keep, second[name].keep) for name in first)


def test_ties_go_by_layer_then_row_then_column():
    layers = make_layers([(16, 16), (16, 16)], BlockShape(8, 8))
    scores = {layer.name: torch.ones(2, 2) for layer in layers}
    masks = allocate(scores, layers, 5 / 8, "global", floor=0.0)
    assert masks["layer0"].keep.tolist() == [[False, False], [False, False]]
    assert masks["layer1"].keep.tolist() == [[False, True], [True, True]]
    masks = allocate(scores, layers, 3 / 8, "row")
    assert masks["layer0"].keep.tolist() == [
        [False, True],
        [True, True],
    ]  # 1.5 blocks: 1, and half a one owed
    assert masks["layer1"].keep.tolist() == [[False, True], [False, True]]


def test_rounding_of_many_small_layers_does_not_add_up():
    layers = make_layers([(24, 8)] * 50, BlockShape(8, 8))
    masks = allocate(make_scores(layers, 0), layers, 0.5, "layer")
    counts = [int((~mask.keep).sum()) for mask in masks.values()]
    assert set(counts) == {1, 2}
    assert sum(counts) == 75


def test_edge_blocks_count_their_own_elements_only():
    layers = make_layers([(72, 8)], BlockShape(64, 8))
    cheap_edge = {"layer0": torch.tensor([[1.0], [0.0]])}
    mask = allocate(cheap_edge, layers, 0.1, "layer")["layer0"]
    assert mask.keep.tolist() == [[True], [False]]
    assert mask.sparsity == pytest.approx(8 / 72)


def test_counts_above_the_range_of_float32_stay_exact():
    layer = PrunableLayer(
        "big", "big", nn.Parameter(torch.empty(2**15, 2**14 + 8, device="meta")), BlockShape(256, 256)
    )
    mask = allocate({"big": torch.rand(layer.grid)}, [layer], 0.5)["big"]
    assert abs(removed(layer, mask.keep) - elements([layer]) / 2) <= 2**15


def test_layers_may_be_given_by_name():
    layers = make_layers([(16, 16)], BlockShape(8, 8))
    scores = make_scores(layers, 0)
    by_name = Budget(0.5).masks(scores, {layer.name: layer for layer in layers})
    assert torch.equal(by_name["layer0"].keep, Budget(0.5).masks(scores, layers)["layer0"].keep)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_scores_that_are_not_finite_name_the_layer(value):
    layers = make_layers([(16, 16), (16, 16)], BlockShape(8, 8))
    scores = make_scores(layers, 0)
    scores["layer1"][0, 1] = value
    with pytest.raises(PrunerError, match="layer1 hold NaN or infinity"):
        allocate(scores, layers, 0.5)


@pytest.mark.parametrize(
    "score",
    [torch.ones(3, 2), torch.ones(4), torch.ones(2, 2, dtype=torch.int64)],
    ids=["shape", "dimensions", "dtype"],
)
def test_scores_of_the_wrong_form_name_the_layer(score):
    layers = make_layers([(16, 16)], BlockShape(8, 8))
    with pytest.raises(PrunerError, match=r"scores of layer layer0 are .* needs \(2, 2\)"):
        allocate({"layer0": score}, layers, 0.5)


def test_a_layer_without_scores_is_named():
    with pytest.raises(PrunerError, match="layer0 has no scores"):
        allocate({}, make_layers([(16, 16)], BlockShape(8, 8)), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0 is out of range"),
        ({"sparsity": -0.1}, "sparsity -0.1 is out of range"),
        ({"sparsity": math.nan}, "sparsity nan is out of range"),
        ({"sparsity": 0.5, "scope": "model"}, "scope 'model' is unknown: choose one of global, layer, row, "),
        ({"sparsity": 0.5, "floor": 1.5}, "floor 1.5 is out of range"),
        ({"sparsity": 0.5, "ceiling": -1}, "ceiling -1 is out of range"),
        ({"sparsity": 0.8, "floor": 0.3}, "floor 0.3 cannot be kept at sparsity 0.8"),
        ({"sparsity": 0.2, "ceiling": 0.5}, "ceiling 0.5 cannot be kept at sparsity 0.2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_budget_that_cannot_be_met_says_which_value_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**options)


@given(problem=problems(), sparsity=SPARSITIES, scope=st.sampled_from(OWN_DENSITY), low=st.floats(0, 1))
def test_each_layer_gets_its_own_density_within_one_block(problem, sparsity, scope, low):
    layers, scores = problem
    budget = Budget(sparsity, scope, low * (1 - sparsity), 1 - low * sparsity, curves(layers))
    densities = budget.densities(layers)
    masks = budget.masks(scores, layers)
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
    wanted = sum(density * size for density, size in zip(densities, sizes, strict=True))
    assert wanted == pytest.approx((1 - sparsity) * sum(sizes), abs=1e-6 * sum(sizes))
    for layer, density, size in zip(layers, densities, sizes, strict=True):
        assert budget.least - 1e-9 <= density <= budget.ceiling + 1e-9
        kept = size - removed(layer, masks[layer.name].keep)
        assert abs(kept - density * size) <= layer.block.numel


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("scope", ["global", *OWN_DENSITY])
def test_without_a_floor_of_its_own_no_layer_is_emptied(scope, sparsity):
    layers = make_layers([(64, 64), (128, 64), (32, 8), (8, 8), (256, 128)], BlockShape(8, 8))
    scores = make_scores(layers, 0)
    for index, layer in enumerate(layers):  # the first two layers' scores are far below all others'
        scores[layer.name] = scores[layer.name] + 10.0 * (index > 1)
        layer.weight.normal_()
        layer.statistics["input_sq"] = torch.rand(layer.shape[1])
    masks = allocate(scores, layers, sparsity, scope, curves=curves(layers))
    for layer, mask in zip(layers, masks.values(), strict=True):
        assert mask.keep.any()
        short = FLOOR_SHARE * (1 - sparsity) * mask.keep.numel() - int(mask.keep.sum())
        assert short < 1, f"{layer.name} lies {short} blocks under the floor"
    total = sum(removed(layer, masks[layer.name].keep) for layer in layers)
    assert abs(total - sparsity * elements(layers)) <= 32


def test_erdos_renyi_keeps_more_of_small_and_narrow_layers():
    layers = make_layers([(64, 64), (64, 256), (256, 256)], BlockShape(8, 8))
    found = Budget(0.75, "erdos_renyi", floor=0.0).densities(layers)
    shares = [(8 + 8) / 64, (8 + 32) / 256, (32 + 32) / 1024]  # (R + C) / (R C)
    assert [density / found[2] for density in found] == pytest.approx([share / shares[2] for share in shares])
    crowded = Budget(0.6, "erdos_renyi", floor=0.0).densities(layers)
    assert crowded[0] == pytest.approx(1.0) and crowded[1] == pytest.approx(
        shares[1] / shares[2] * crowded[2]
    )


def test_outliers_make_a_transformer_block_denser():
    layers = [
        PrunableLayer(f"layers.{block}.{name}", "m", nn.Parameter(torch.ones(32, 64)), BlockShape(8, 8))
        for block in range(3)
        for name in ("q", "up")
    ]
    for index, layer in enumerate(layers):
        layer.statistics["input_sq"] = torch.ones(64)
        layer.weight[: 2 * (index // 2), 0] = 100.0  # none, 2 and 4 outliers in each layer of a block
    found = Budget(0.5, "outlier").densities(layers)
    assert found == pytest.approx([0.42, 0.42, 0.5, 0.5, 0.58, 0.58])  # the paper's lambda is 0.08
    del layers[3].statistics["input_sq"]
    with pytest.raises(
        ConfigError, match=r"needs the statistic 'input_sq' of layer layers.1.up: put a calibrate"
    ):
        Budget(0.5, "outlier").densities(layers)


def test_sensitivity_costs_the_least_loss():
    """Against all densities in steps of an eighth, which is where the measured points lie."""
    layers = make_layers([(64, 8), (64, 8), (128, 8)], BlockShape(8, 8))
    measured = {
        "layer0": {0.25: 0.1, 0.5: 0.4, 1.0: 2.0},
        "layer1": {0.25: 0.05, 0.5: 0.1, 0.75: 0.9, 1.0: 5.0},
        "layer2": {0.5: 1.0, 1.0: 2.5},
    }

    def loss(densities):
        return sum(
            float(np.interp(1 - density, [0, *curve], [0, *curve.values()]))
            for density, curve in zip(densities, measured.values(), strict=True)
        )

    found = Budget(0.5, "sensitivity", floor=0.0, curves=measured).densities(layers)
    steps = [eighth / 8 for eighth in range(9)]
    fitting = [d for d in itertools.product(steps, repeat=3) if d[0] + d[1] + 2 * d[2] == 2.0]
    assert loss(found) == pytest.approx(min(map(loss, fitting)))


def test_a_curve_that_is_not_convex_or_falls_is_evened_out():
    layers = make_layers([(64, 8), (64, 8)], BlockShape(8, 8))
    measured = {"layer0": {0.25: 1.0, 0.5: 0.2, 0.75: 1.2}, "layer1": {0.5: 1.0}}
    # layer0 rises to 1 and stays, then on: its hull is the line to (0.75, 1.2), flatter than layer1's.
    assert Budget(0.375, "sensitivity", 0.0, curves=measured).densities(layers) == pytest.approx([0.25, 1.0])


def test_sensitivity_without_measurements_says_how_to_make_them():
    with pytest.raises(ConfigError, match="run `sparsify sensitivity MODEL --data FILE`"):
        Budget(0.5, "sensitivity")
    layers = make_layers([(16, 16)], BlockShape(8, 8))
    with pytest.raises(ConfigError, match="sensitivity of layer layer0 was not measured"):
        Budget(0.5, "sensitivity", curves={}).densities(layers)
